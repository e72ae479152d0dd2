"Group-relative policy gradients: parity with TRL's GRPOTrainer and with the formula, on and off policy."
import math
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mapo.engines import load_model
from mapo.objectives import GRPO, Objective
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
