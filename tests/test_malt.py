"""The experiment, its notebook and its command line agree; chains, trees and trainings too long for a notebook cell."""
import json
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from mapo.cli import checked, settable
from mapo.experiment import Step, checkable, compute, experiment, rows as compact_rows
from mapo.malt import (ARMS, CLAIMS, COMPARISONS, CORE, MALT, Malt, make_harder, other_critiques, verdict_row,
                       word_problems)
from mapo.methods import make_problems
from mapo.pairs import Built, Selection, own_pairs, own_positives
from mapo.record import load_record, redraw
from mapo.rewards import example_tree
from mapo.runs import Run

KINDS = 'sa,malt_one,malt,star_ma_vote,gold_sft,gv,gr,malt_shuffled,malt_told_right,debate,malt_harder,malt_branching_4'
SMALL = dict(n_train=4, n_dev=3, n_test=3, n_hard=3, branching=(2, 2, 2), sft_updates=1, dpo_updates=1, batch_size=4)


def test_the_command_offers_every_setting_and_says_what_it_is():
    offered = settable('malt')
    assert set(offered) == {f.name for f in fields(Malt)} and all(about['help'] for about in offered.values())


def test_every_setting_of_every_preset_is_of_the_type_that_is_said():
    for preset in MALT.presets.values():
        given = {f.name: list(v) if isinstance(v := getattr(preset, f.name), tuple) else v for f in fields(Malt)}
        assert MALT.settings('tiny', **checked('malt', given)['overrides']) == preset


def test_core_holds_the_primary_comparisons_and_every_arm_can_be_asked_for():
    assert {name for pair in COMPARISONS for name in pair} <= set(CORE) and len(COMPARISONS) <= 5
    assert MALT.choose('all') == list(ARMS)


@pytest.fixture(scope='module')
def record(runs):
    "Arms of every kind: the run, and its record. test_papers.py runs the notebook with the same."
    run = Run('kinds', {}, root=runs)
    return run, experiment(run, MALT, MALT.settings('smoke', **SMALL), KINDS, [0], 'dev')


@pytest.mark.slow
def test_the_record_is_drawn(record, tmp_path):
    drawn = {p.name for p in redraw(record[1], tmp_path)}
    assert {'accuracy.png', 'claims.md', 'readouts.md', 'flips.md', 'sweep.png', 'training.png', 'results.md'} <= drawn


@pytest.mark.slow
def test_arms_share_trees_trainings_and_passes(record):
    "malt and malt_one differ in how they are read; star's fine-tuned models are where MALT's DPO begins."
    run = record[0]
    made = pd.DataFrame(run.stages).drop_duplicates('key').query("stage == 'train'")
    specs = [json.loads((run.artifacts/f'train-{key[:16]}'/'manifest.json').read_text())['spec'] for key in made.key]
    kinds = [spec['inputs']['objective']['type'] for spec in specs]
    assert kinds.count('DPO') == 2*2, 'verifier and refiner, with two kinds of tree'
    assert kinds.count('SFT') == 2*3 + 1, 'three roles with two kinds of tree, and the generator alone'
    rows, _, _ = load_record(record[1])
    one, vote = (rows[rows.arm == arm].set_index('problem_id') for arm in ('malt_one', 'malt'))
    assert (one.n == 3).all() and (vote.n == 1).all() and (one.maj == vote.c).all()


@pytest.mark.slow
def test_what_is_measured_adds_up(record):
    rows, costs, manifest = load_record(record[1])
    flips = pd.read_csv(record[1]/'flips.csv')
    assert np.allclose(flips.groupby('arm').share.sum(), 1)
    readouts = pd.read_csv(record[1]/'readouts.csv').set_index(['arm', 'readout']).accuracy
    ends = flips[flips.flip.isin(['wrong to right', 'right to right'])].groupby('arm').share.sum()
    for arm, last in dict(malt='refiner', gv='verifier', gr='refiner').items():
        assert ends[arm] == pytest.approx(readouts[arm, f'after {last}'])
    assert readouts['malt', 'vote'] == pytest.approx(rows[rows.arm == 'malt'].c.mean())
    calls = pd.read_csv(record[1]/'inference.csv').set_index('arm').calls
    assert calls[['sa', 'gold_sft', 'malt_one', 'malt', 'gv', 'debate']].tolist() == [1, 3, 3, 9, 6, 9]
    assert set(rows.arm) & {'malt_harder',
                            'ma_vote_harder'} == set() and 'harder' in set(pd.read_csv(record[1]/'sweep.csv').value)
    updates = costs.set_index('arm').updates
    assert updates['malt'] == updates['gold_sft'] == 5 and updates['star_ma_vote'] == 3
    assert manifest['bases']['malt'] == 'ma_vote' and manifest['bases']['gold_sft'] == 'sa_vote'


@pytest.mark.slow
def test_dpo_begins_at_the_fine_tuned_model(record):
    "Held to the model that it starts from, the first margin is zero, and the second is not."
    margins = pd.read_csv(record[1]/'training.csv').query("arm == 'malt'").sort_values('step').margin
    assert margins.iloc[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('variant', [dict(lora_rank=4, sft_learning_rate=1e-3),
                                     dict(verifier='tiny:products', generator_dpo=True, n_pairs=1),
                                     dict(gap=.5, threshold=.4, branching=(3, 2, 1))], ids=str)
def test_variants_run_to_the_end(variant, runs):
    done = compute(Run('variant', variant, root=runs), MALT,
                   MALT.settings('smoke', **SMALL | dict(n_train=6) | variant), 'malt', [0], 'dev')
    step = done[-1]
    assert step.arm.name == 'malt' and any(f.training for f in step.fits)
    if 'lora_rank' in variant:
        assert len({a.model.path for a in step.team}) == 1 and any(a.model.adapter for a in step.team)
    if 'generator_dpo' in variant: assert [f.objective for f in step.fits if f.learner == 'generator'] == ['sft', 'dpo']


def test_another_threshold_grows_no_new_tree(runs):
    first, second = (Run(name, {}, root=runs) for name in ('first', 'second'))
    compute(first, MALT, MALT.settings('smoke', **SMALL), 'star_ma', [0], 'dev')
    compute(second, MALT, MALT.settings('smoke', **SMALL | dict(threshold=.2)), 'star_ma', [0], 'dev')
    asked = lambda run: {(s['stage'], s['key']) for s in run.stages}
    made = [stage for stage, key in asked(second) - asked(first)]
    assert (made.count('value_turns') == 1
            and made.count('sample_tree') <= 2), 'only the evaluation of newly trained roles'


def test_contexts_that_outgrow_the_window_are_counted_and_wrong(runs):
    run = Run('long', {}, root=runs)
    record = experiment(run, MALT, MALT.settings('smoke', **SMALL | dict(max_tokens=970, votes=1)), 'ma', [0], 'dev')
    rows, _, _ = load_record(record)
    assert (rows.c == 0).all() and (rows.n == 1).all() and len(rows) == 3
    assert pd.read_csv(record/'inference.csv').not_asked.sum() == 3
    readouts = (pd.read_csv(record/'readouts.csv').set_index('readout').accuracy if (record/'readouts.csv').exists()
                else {})
    assert len(readouts) == 3 and readouts['after refiner'] == 0
    with pytest.raises(ValueError, match="star_ma: nothing to learn for generator: chosen: "):
        compute(run, MALT, MALT.settings('smoke', **SMALL | dict(max_tokens=970, votes=1)), 'star_ma', [0], 'dev')


def test_nobody_right_is_one_sentence(runs):
    with pytest.raises(ValueError, match="malt: nothing to learn for generator: chosen: .* wrong"):
        compute(Run('wrong', {}, root=runs), MALT, MALT.settings('smoke', **SMALL | dict(form='a*b*c*d*e')), 'malt',
                [0], 'dev')


@pytest.mark.parametrize('leaves,fate', [([[1, 1], [1, 1]], 'nothing to reject'),
                                         ([[0, 0], [0, 0]], 'nothing to choose')])
def test_a_role_without_pairs_says_why(leaves, fate, tmp_path):
    tree = example_tree(leaves)
    value = float(leaves[0][0])

    def grown():
        asked = pd.DataFrame(dict(context_id=tree.context_id.unique()))
        return dict(turns=tree.assign(split='train', purpose='train', iteration=1),
                    contexts=asked.assign(messages=[[dict(role='user', content='?')]]*len(asked)),
                    scores=pd.DataFrame(dict(turn_id=tree.turn_id, name='positive', value=value, label=None,
                                             scorer_key='by hand')))

    run = Run('pairs', {}, root=tmp_path)
    turns = run.stage(grown)
    siblings = Selection(score='positive', by='context_id', n_positives=0, n_negatives=0, n_pairs=0)
    def reason(role, build):
        data = run.stage(build, turns=(turns.where(agent=role), turns), contexts=turns, agent=role, selection=siblings)
        return Built(data.read('table'), data.read('counts')).reason
    assert f'2 {fate}' in reason('refiner', own_pairs)
    assert bool(reason('verifier', own_positives)) == (value == 0)
    assert 'it was never asked' in reason('critic', own_positives)


def test_a_verifier_that_answers_instead_of_judging_is_counted(tmp_path):
    texts = dict(g='06+08-7#### 41', v1='06+08-7#### 42', v2='<right>#### 41', v3='Verdict: incorrect')
    tree = example_tree([[0], [0], [0]]).query("role != 'refiner'").assign(
        sample=0, text=lambda t: t.turn_id.map(texts))

    def said():
        scores = [dict(turn_id=t, name=n, value=v, label=l, scorer_key='by hand')
                  for t in tree.turn_id for n, v, l in (('answer', np.nan, '41'), ('correct', 0., None))]
        return dict(turns=tree, scores=pd.DataFrame(scores))

    talk = Run('verdict', {}, root=tmp_path).stage(said)
    row = verdict_row(Step(MALT.arm('gv'), 0, 1, None, dict(evaluate=(talk, talk))))
    assert row['no_verdict'] == pytest.approx(1/3) and row['no_answer'] == pytest.approx(1/3)
    assert row['objects'] == pytest.approx(1/3) and np.isnan(row['approves'])


def test_scripted_critiques_keep_what_the_others_said():
    tree = example_tree([[1]]).query("role != 'refiner'").assign(sample=0, text='#### 6', problem_id='arithmetic/x')
    problems = pd.DataFrame(dict(problem_id=['arithmetic/x'], question=['2*3+2*2-4'], answer=['6'], kind='number'))
    right, wrong = (other_critiques(tree, problems, told, 0) for told in ('right', 'wrong'))
    assert right[0] == wrong[0] == '#### 6' and right[1].endswith('#### 6') and not wrong[1].endswith('#### 6')


def test_word_problems_of_dev_and_test_are_disjoint_and_repeat():
    dev, test = word_problems(200, 'dev'), word_problems(200, 'test')
    assert len(dev) == len(test) == 200 and set(dev.question).isdisjoint(test.question)
    assert dev.equals(word_problems(200, 'dev'))
    assert (dev.answer.astype(int) > 0).all() and not dev.question.str.contains('[{}]').any()


@pytest.mark.parametrize('how,sentence', [
    (dict(seeds=[0, 0]), r'seeds must be distinct whole numbers, at least one, not \[0, 0\]'),
    (dict(split='train'), "split must be 'dev' or 'test', not 'train'"),
    (dict(arms='mallt'), "malt has no arm 'mallt'")])
def test_what_cannot_be_run_is_refused_first(how, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        compute(Run('refused', {}, root=tmp_path), MALT, MALT.settings('smoke'),
                **dict(arms='core', seeds=[0], split='dev') | how)
    assert not list(tmp_path.rglob('*.parquet'))


@pytest.mark.parametrize('preset', ['smoke', 'tiny'])
def test_there_are_enough_harder_problems_and_none_was_trained_on(preset, tmp_path):
    s, run = MALT.presets[preset], Run('harder', {}, root=tmp_path)
    harder = run.stage(make_harder, source=s.source, form=s.form, low=s.hard_low, high=s.high, question=s.question,
                       n=s.n_hard, seed=s.problem_seed).read('problems')
    trained_on = run.stage(make_problems, source=s.source, form=s.form, low=s.low, high=s.high, question=s.question,
                           data='', n_train=s.n_train, n_dev=1, n_test=1, seed=s.problem_seed).read('problems')
    assert (harder.groupby('split').size() == s.n_hard).all()
    assert set(harder.problem_id).isdisjoint(trained_on.problem_id[trained_on.split == 'train'])


def test_a_setting_that_makes_two_arms_one_drops_their_comparison():
    "`generator_dpo=True` makes MALT what `malt_generator_dpo` is."
    claim = next(c for c in CLAIMS if c['tests'] == [['malt', 'malt_generator_dpo']])
    judge = lambda preset: checkable([claim], {a.name: a for a in ARMS}, MALT.presets[preset])[0].get('untestable')
    assert judge('paper') is None
    assert (judge('paper_qwen')
            == 'it holds MALT against MALT, generator with DPO, which are one arm under these settings')


@pytest.mark.slow
def test_a_second_round_grows_a_tree_of_trained_roles(runs):
    settings = MALT.settings('smoke', **SMALL | dict(n_train=6))
    steps = compute(Run('twice', {}, root=runs), MALT, settings, 'malt_twice', [0], 'dev')
    first, second = [step for step in steps if step.arm.name == 'malt_twice']
    assert (first.iteration, second.iteration) == (1, 2) and first.turns.key != second.turns.key
    told = first.turns.read('turns').model_key
    learnt = {f.learner for f in first.fits if f.training}
    again = second.turns.read('turns').groupby('role').model_key.first()
    assert {role for role, key in again.items() if key not in set(told)} == learnt
    assert compact_rows(MALT, settings, steps).query("arm == 'malt_twice'").iteration.unique().tolist() == [1, 2]
