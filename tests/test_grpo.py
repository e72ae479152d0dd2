"Policy gradients: parity with TRL's GRPOTrainer and the formula, on and off policy; agents, teams and trees online."
import math
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mapo.agents import Model
from mapo.engines import load_model
from mapo.experiment import Arm, Experiment, Settings, Step, compute, online
from mapo.malt import Malt
from mapo.methods import make_problems
from mapo.objectives import GRPO, Objective
from mapo.pairs import value_turns
from mapo.plan import plan_paper
from mapo.rewards import Grouping, grade
from mapo.runs import Run, scored
from mapo.sampling import sample_alone, sample_tree
from mapo.tiny import specialists
from mapo.training import example_tokens, reference_log_probabilities, train
from test_training import random_model, says, tokenizer

ROWS,LONGEST = 8,40


@pytest.fixture(scope='module')
def initial(tmp_path_factory): return random_model(tmp_path_factory.mktemp('models')/'initial')


@pytest.fixture(scope='module')
def other(tmp_path_factory): return random_model(tmp_path_factory.mktemp('models')/'other', seed=1)


@pytest.fixture(scope='module')
def rows():
    "Answers of very unequal lengths, two to a question, one of them cut off; advantages of either sign."
    rng = np.random.default_rng(0)
    word = lambda longest: ''.join(rng.choice(list('abc 123'), rng.integers(1, longest)))
    said = [dict(prompt=says(f'{i//2}+{"1"*(i//2)}=', 'user'), completion=says(word(LONGEST if i % 3 else 4)),
                 completion_finish='length' if i == 5 else 'stop', advantage=a)
            for i, a in enumerate([1.2, -1.2, -.7, .7, 1.9, -1.9, -.3, .3])]
    return pd.DataFrame(said)


@pytest.fixture(scope='module')
def theirs(initial, tmp_path_factory):
    "A GRPOTrainer of TRL, whose settings each case sets."
    args = GRPOConfig(output_dir=str(tmp_path_factory.mktemp('trl')), use_cpu=True, bf16=False, report_to='none',
                      gradient_checkpointing=False, per_device_train_batch_size=ROWS, num_generations=2,
                      beta=0., use_bias_correction_kl=False) # else its KL is weighted by the ratio (DeepSeek-V3.2)
    return GRPOTrainer(load_model(initial, 'cpu')[0], [lambda completions, **more: [0.]*len(completions)], args,
                       datasets.Dataset.from_list([dict(prompt=says('1', 'user'))]), processing_class=tokenizer())


def trl_loss(trainer, model, rows, settings, sampler, reference):
    "TRL's loss of all rows at once, and the norm of its gradient."
    net = load_model(model, 'cpu', trainable=True)[0].eval()
    add_fused_lm_head(net, settings.temperature, outputs=('log_probs', 'entropy'))
    trainer.model,trainer.beta = net,settings.kl
    trainer.epsilon_low,trainer.epsilon_high = settings.clip_low,settings.clip_high
    trainer.loss_type = dict(sequence='grpo', tokens='dapo', constant='dr_grpo')[settings.average]
    trainer.max_completion_length = settings.constant
    tokens,_ = example_tokens(tokenizer(), rows)
    left = lambda lists: torch.tensor([[0]*(max(map(len, lists)) - len(l)) + l for l in lists])
    right = lambda lists: torch.tensor([l + [0]*(max(map(len, lists)) - len(l)) for l in lists])
    each = lambda table: right([list(l) for l in table.completion_logps])
    inputs = dict(prompt_ids=left(list(tokens.prompt_ids)), completion_ids=right(list(tokens.completion_ids)),
                  prompt_mask=left([[1]*len(l) for l in tokens.prompt_ids]),
                  completion_mask=right([[1]*len(l) for l in tokens.completion_ids]),
                  advantages=torch.tensor(rows.advantage.to_numpy(), dtype=torch.float32),
                  old_per_token_logps=each(sampler), num_items_in_batch=tokens.completion_ids.map(len).sum())
    inputs['num_items_in_batch'] = torch.tensor(int(inputs['num_items_in_batch']))
    if settings.kl: inputs['ref_per_token_logps'] = each(reference)
    loss = trainer._compute_loss(net, inputs)
    loss.backward()
    return loss.item(),math.sqrt(sum((p.grad**2).sum().item() for p in net.parameters() if p.grad is not None))


CASES = dict(
    grpo=GRPO(kl=.04), rloo=GRPO(average='constant', clip_low=1, clip_high=9.),
    dapo=GRPO(average='tokens', clip_high=.28),
    dr_grpo=GRPO(average='constant', constant=LONGEST), warm=GRPO(temperature=.7, kl=.1))


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_trls(name, theirs, initial, other, rows, tmp_path):
    "At the first update, where nothing has moved, and two updates later, where tokens are clipped."
    settings = replace(CASES[name], batch_size=ROWS, learning_rate=1e-2, schedule='constant')
    held = dict(sampler=reference_log_probabilities(initial, rows, settings),
                reference=reference_log_probabilities(other, rows, settings))
    ours = train(initial, rows, replace(settings, updates=3), tmp_path/'ours', **held).log
    moved = train(initial, rows, replace(settings, updates=2), tmp_path/'two', **held).model
    for model, at in ((initial, 0), (moved, 2)):
        loss,norm = trl_loss(theirs, model, rows, settings, **held)
        assert ours.loss[at] == pytest.approx(loss, abs=1e-5)
        assert ours.grad_norm[at] == pytest.approx(norm, rel=1e-4)
    assert ours.ratio[0] == pytest.approx(1, abs=1e-5) and ours.clipped[0] == 0
    metrics = {m: values[-1] for m, values in theirs._metrics['eval'].items()}
    assert ours.entropy[2] == pytest.approx(metrics['entropy'], abs=1e-4)
    assert ours.clipped[2] == pytest.approx(metrics['clip_ratio/region_mean'], abs=1e-6)
    assert (ours.clipped[2] > .1) == (name != 'rloo')
    if settings.kl: assert ours.kl[2] == pytest.approx(metrics['kl'], rel=1e-4)


def by_hand(model, rows, settings, sampler, reference):
    "The formula, one answer and one token at a time, from the plain logits."
    net,total,tokens = load_model(model, 'cpu')[0],0.,example_tokens(tokenizer(), rows)[0]
    lengths = tokens.completion_ids.map(len)
    divisor = dict(sequence=lengths, tokens=[np.average(lengths*rows['weight'])]*len(rows),
                   constant=[settings.constant]*len(rows))[settings.average]
    for i, r in enumerate(tokens.itertuples()):
        with torch.no_grad(): scores = net(torch.tensor([r.prompt_ids+r.completion_ids])).logits[0].double()
        scores = (scores/settings.temperature).log_softmax(-1)
        for t, token in enumerate(r.completion_ids):
            logp,a = float(scores[len(r.prompt_ids)+t-1, token]),rows.advantage[i]
            ratio = math.exp(logp - sampler.completion_logps[i][t])
            kept = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            gone = reference.completion_logps[i][t] - logp
            each = -min(ratio*a, kept*a) + settings.kl*(math.exp(gone) - gone - 1)
            total += rows['weight'][i]*each/list(divisor)[i]/len(rows)
    return total


@pytest.mark.parametrize('average', ['sequence', 'tokens', 'constant'])
def test_formula_with_weights_in_passes_and_with_an_adapter(average, initial, other, rows, tmp_path):
    "Two updates, clipped on both sides and held to a reference; cut into passes; the trained weights an adapter's."
    settings = GRPO(average=average, constant=7, kl=.2, clip_low=.01, clip_high=.02, temperature=1.3, batch_size=ROWS,
                    learning_rate=1e-3, updates=2, schedule='constant', lora_rank=4)
    weighed = rows.assign(weight=[1., 2, .5, 1, 0, 3, 1, 1])
    held = dict(sampler=reference_log_probabilities(initial, rows, settings),
                reference=reference_log_probabilities(other, rows, settings))
    whole = train(initial, weighed, settings, tmp_path/'whole', **held).log
    one = train(initial, weighed, replace(settings, updates=1), tmp_path/'one', **held).model
    assert one.adapter and 0 < whole.clipped[1] < 1
    for model, at in ((initial, 0), (one, 1)):
        assert whole.loss[at] == pytest.approx(by_hand(model, weighed, settings, **held), abs=1e-5)
    cut = train(initial, weighed, replace(settings, micro_batch_size=2), tmp_path/'cut', **held).log
    for name in whole: assert np.allclose(cut[name], whole[name], rtol=1e-3, atol=1e-5), name


def test_an_adapter_is_its_own_sampler_at_the_next_iteration(initial, rows, tmp_path):
    settings = GRPO(kl=.1, batch_size=ROWS, learning_rate=1e-2, updates=1, lora_rank=4)
    first = train(initial, rows, settings, tmp_path/'first', initial, sampler=initial)
    second = train(first.model, rows, settings, tmp_path/'second', initial, sampler=first.model).log.iloc[0]
    stale = train(first.model, rows, settings, tmp_path/'stale', initial, sampler=initial).log.iloc[0]
    assert first.log.kl[0] == pytest.approx(0, abs=1e-5) and second.kl > 1e-3
    assert second.ratio == pytest.approx(1, abs=1e-5) and stale.sampler_kl > 1e-3


@dataclass(frozen=True)
class Watched(Objective):
    "An objective of one's own that reads everything there is, of two answers a row."
    answers,reference,sampler,per_token,columns = ('chosen', 'rejected'),True,True,True,('gold', 'odds')

    def loss(self, batch):
        for name, said in batch.tokens.items():
            assert said.mask.sum(1).equal(batch.length[name]) and said.logp.shape == said.entropy.shape
            for whose in ('sampler', 'reference'):
                each = getattr(said, whose)
                assert torch.allclose(each.sum(1), getattr(batch, whose)[name], atol=1e-4)
                assert not each[~said.mask].any() and each[said.mask].all()
            assert torch.allclose(said.logp.sum(1), batch.logp[name]) and (said.entropy[said.mask] > 0).all()
            assert torch.allclose(said.logp, said.sampler, atol=1e-5) and not torch.allclose(said.logp, said.reference)
        assert torch.isclose(batch.mean_length['chosen'], batch.length['chosen'].float().mean())
        return batch.columns['gold'].mean() - batch.columns['odds'].mean() + 0*batch.logp['chosen'].sum()

    def report(self, batch): return dict(rows=len(batch.weight))


def test_what_an_objective_of_ones_own_is_given(initial, other, rows, tmp_path):
    pairs = rows.rename(columns=dict(completion='chosen')).assign(
        rejected=[*rows.completion[1:], rows.completion[0]], gold=range(ROWS), odds=1)
    log = train(initial, pairs, Watched(updates=1, batch_size=ROWS), tmp_path/'out', other, sampler=initial).log
    assert log.loss[0] == pytest.approx(2.5) and log.rows[0] == ROWS


SMALL = Settings(n_train=8, n_dev=0, n_test=0, max_tokens=48)
ONLINE = GRPO(learning_rate=1e-4, updates=1)


@pytest.fixture
def run(tmp_path): return Run('online', {}, root=tmp_path)


def problems_of(run): return run.stage(make_problems, **SMALL.problem_set()).where(split='train')


def alone(run, n):
    "How a team answers whose agents do not see each other."
    def answer(team, problems, iteration):
        turns = run.stage(sample_alone, problems=problems, team=team, n=n, purpose='train', iteration=iteration, seed=0,
                          **SMALL.sampling())
        return turns, (run.stage(grade, turns=turns, problems=problems),)
    return answer


def as_a_tree(run):
    "How MALT's roles answer, two children everywhere; the worth of a turn is the mean of its children's."
    def answer(team, problems, iteration):
        turns = run.stage(sample_tree, problems=problems, team=team, branching=(2, 2, 2), purpose='train',
                          iteration=iteration, seed=0, **SMALL.sampling())
        graded = run.stage(grade, turns=turns, problems=problems)
        return turns, (graded, run.stage(value_turns, turns=(turns, graded), last=2))
    return answer


def test_a_team_each_by_its_own_measure(run):
    "Dr. MAS: an agent's advantages have mean 0 and standard deviation 1 among its own answers to a problem."
    team = specialists()
    [heard] = online(run, SMALL, team, problems_of(run), alone(run, 6), ONLINE, 1, 4, Grouping(by='problem_id'))
    for name, found in zip(('products', 'borrows', 'carries'), heard.fits):
        rows = found.data.read('table')
        assert found.learner == name and set(rows.agent) == {name} and len(rows)
        groups = rows.groupby('problem_id').advantage
        assert np.allclose(groups.mean(), 0) and np.allclose(groups.std(), 1)
    models = {a.model.path for a in heard.team}
    assert len(models) == 3 and not models & {a.model.path for a in team}


def test_agents_that_share_a_model_train_it_together(run):
    team = specialists()
    twins = team.with_models(dict(borrows=team['products'].model))
    [heard] = online(run, SMALL, twins, problems_of(run), alone(run, 6), ONLINE, 1, 4, shared=True)
    assert [f.learner for f in heard.fits] == ['products and borrows', 'carries']
    rows = heard.fits[0].data.read('table')
    assert set(rows.agent) == {'products', 'borrows'}
    assert np.allclose(rows.groupby(['agent', 'context_id']).advantage.mean(), 0)
    assert heard.team['products'].model.path == heard.team['borrows'].model.path != heard.team['carries'].model.path


def test_a_tree_learns_by_siblings_and_is_planned_as_it_runs(run):
    "MALT's roles, online: a turn's advantage is its value less the mean of those under the same parent."
    def method(run, s, arm, seed, problems, split):
        few = problems.where(split='train')
        heard = online(run, s, Malt().team(), few, as_a_tree(run), ONLINE, 2, 4, Grouping(score='value', scale='none'))
        return [Step(arm, seed, i, problems, {}, *h) for i, h in enumerate(heard, 1)]
    tree = Experiment('tree_grpo', dict(smoke=SMALL), (Arm('chain'), Arm('tree', base='chain')), method, None)
    steps = compute(run, tree, SMALL, 'tree')[-2:]
    for step in steps:
        turns = scored(step.turns, *step.scores)
        rows = pd.concat([f.data.read('table') for f in step.fits if f.training])
        siblings = turns.groupby(['agent', 'context_id']).value
        gain = (turns.value - siblings.transform('mean')).set_axis(turns.turn_id)
        assert np.allclose(rows.advantage, gain[rows.turn_id]) and (rows.advantage != 0).all()
        assert set(rows.turn_id) == set(gain.index[gain.abs() > 1e-9])
    planned = plan_paper(tree, 'smoke', 'tree').table
    fits = [f for step in steps for f in step.fits]
    counted = lambda table, kind, column: int(table[table.kind == kind][column].sum())
    assert counted(planned, 'sample', 'answers') == sum(len(step.turns.read('turns')) for step in steps)
    assert counted(planned, 'tune', 'updates') == len(fits) == 6 and all(f.training for f in fits)
    rows = [len(f.data.read('table')) for f in fits]
    assert counted(planned, 'tune', 'data') == sum(len(step.turns.read('turns')) for step in steps) > sum(rows)
    assert set(planned[planned.kind == 'tune'].purpose) == {'GRPO'}


def test_an_interrupted_run_goes_on_where_it_stopped(run, tmp_path):
    team,problems = specialists(),problems_of(run)
    def asked(answer): return online(run, SMALL, team, problems, answer, replace(ONLINE, kl=.1), 2, 3)
    def broken(team, problems, iteration):
        if iteration == 2: raise KeyboardInterrupt
        return alone(run, 6)(team, problems, iteration)
    with pytest.raises(KeyboardInterrupt): asked(broken)
    done = len(run.stages)
    heard = asked(alone(run, 6))
    again = run.stages[done:]
    made = [stage['stage'] for stage in again if not stage['reused']]
    assert made.count('sample_alone') == 1 and made.count('train') == made.count('own_turns') == 3
    assert [stage['stage'] for stage in again if stage['reused']] == [stage['stage'] for stage in run.stages[1:done]]
    logs = [f.training.read('log') for f in heard[1].fits]
    assert all(log.ratio[0] == pytest.approx(1, abs=1e-4) for log in logs), 'held to those that have just spoken'
    assert all(log.kl[0] > 0 for log in logs), 'and to those of the beginning'
    assert {p.name for p in heard[1].fits[0].training.path.glob('*.parquet')} == {
        'log.parquet', 'reference.parquet', 'sampler.parquet'}
