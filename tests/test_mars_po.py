"""The experiment, its notebook and its command line agree; variants that take too long for a notebook cell."""
import json, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest

from mapo.cli import checked, main, settable
from mapo.experiment import compute, experiment, write_record
from mapo.mars_po import ARMS, MARS_PO, MarsPO, reward_scores
from mapo.record import redraw
from mapo.runs import Run
from mapo.tiny import train_tiny

SMALL = dict(n_train=8, n_dev=4, n_test=4, n_samples=4, n_evaluate=1, iterations=2, updates=2, batch_size=4,
             reward_updates=2)
ONCE = SMALL | dict(iterations=1)


def test_the_command_offers_every_setting_and_says_what_it_is():
    offered = settable('mars_po')
    assert set(offered) == {f.name for f in fields(MarsPO)} and all(about['help'] for about in offered.values())


def test_every_setting_of_every_preset_is_of_the_type_that_is_said():
    for preset in MARS_PO.presets.values():
        given = {f.name: list(v) if isinstance(v := getattr(preset, f.name), tuple) else v for f in fields(MarsPO)}
        assert MARS_PO.settings('tiny', **checked('mars_po', given)['overrides']) == preset


@pytest.mark.parametrize('variant', [pytest.param(dict(lora_rank=4, learning_rate=1e-3), marks=pytest.mark.slow),
                                     dict(reference='initial'), dict(init='initial'),
                                     dict(n_samples=1, n_positives=0, n_negatives=0, n_pairs=0)])
def test_variants_run_to_the_end(variant, runs):
    run = Run('variant', variant, root=runs)
    settings = MARS_PO.settings('smoke', **SMALL | variant)
    record = experiment(run, MARS_PO, settings, 'mars_po,sft_hybrid', [0], 'dev')
    rows = pd.read_parquet(record/'results.parquet')
    assert set(zip(rows.arm, rows.iteration)) == {('base', 0),
                                                  *((arm, t) for arm in ('sft_hybrid', 'mars_po') for t in (1, 2))}
    assert (rows.n == 1).all() and rows.problem_id.nunique() == 4


def test_the_initial_reference_is_not_the_previous_one(runs):
    "At iteration 2 the first step's log-ratios are zero against the previous model, and not against the initial one."
    margins = {}
    for reference in ('previous', 'initial'):
        record = experiment(Run(reference, {}, root=runs), MARS_PO,
                            MARS_PO.settings('smoke', **SMALL, order='drawn', reference=reference, learning_rate=1e-3),
                            'mars_po', [0], 'dev')
        curves = pd.read_csv(record/'training.csv').set_index('step')
        margins[reference] = curves.margin[[1, 3]].abs().tolist()
    assert margins['previous'] == pytest.approx([0, 0], abs=1e-4)
    assert margins['initial'][0] == pytest.approx(0, abs=1e-4) and margins['initial'][1] > 1e-3


def test_answers_to_problems_of_ones_own_are_graded_a_second_time(tmp_path):
    questions = [f'{a}*{b}+{c}*4-3' for a in (4, 5) for b in (6, 7) for c in (2, 3, 8)]
    rows = [dict(question=q, answer=str(eval(q))) for q in questions]
    (tmp_path/'mine.jsonl').write_text(''.join(json.dumps(row)+'\n' for row in rows))
    settings = MARS_PO.settings('smoke', source=str(tmp_path/'mine.jsonl'), n_train=4, n_dev=4, n_test=4)
    record = experiment(Run('own', {}, root=tmp_path/'runs'), MARS_PO, settings, 'base', [0], 'dev')
    asked = pd.read_csv(record/'opinions.csv')
    assert asked.arm.tolist() == ['base'] and 4 <= asked.answers[0] <= 4*2*3 and asked.disagreed[0] == 0
    assert not (record/'disagreements.csv').exists()


@pytest.fixture(scope='module')
def every(runs):
    "One iteration of every arm: the run, what each arm did, and the record; test_papers.py runs the notebook likewise."
    run = Run('every', {}, root=runs)
    settings = MARS_PO.settings('smoke', **ONCE)
    steps = compute(run, MARS_PO, settings, 'all', [0], 'dev')
    record = write_record(run, MARS_PO, settings, steps, reward_scores(run, settings, steps))
    return run, {step.arm.name: step for step in steps}, record


@pytest.mark.slow
def test_arms_share_the_samples_they_have_in_common(every):
    keys = lambda same: {step.turns.key for arm, step in every[1].items()
                         if step.turns and arm.endswith('_same') == same}
    assert len(keys(False)) == len(keys(True)) == 1 and keys(False) != keys(True)


@pytest.mark.slow
def test_arms_that_are_compared_learn_from_the_same_problems(every):
    asked = lambda arm, agent: {p for f in every[1][arm].fits if f.learner == agent
                                for p in f.data.read('data').problem_id}
    for agent in [a.name for a in every[1]['mars_po'].team]:
        assert asked('mars_po', agent) == asked('sft_hybrid', agent) == asked('mars_po_random',
                                                                              agent) == asked('mars_po_pooled', agent)


@pytest.mark.slow
def test_a_reward_model_learns_the_grades_its_arm_sees_and_is_shared_where_they_are_the_same(every):
    model = lambda arm: every[1][arm].more['reward_model'].path
    assert model('mars_po') == model('sft_own') == model('dpo') == model('mars_po_ranked')
    assert len({model('mars_po'), model('mars_po_flipped'), model('mars_po_same')}) == 3
    assert every[1]['mars_po_random'].more['reward_model'] is None


@pytest.mark.slow
def test_the_record_of_every_arm_is_drawn(every, tmp_path):
    record = every[2]
    assert set(pd.read_parquet(record/'results.parquet').arm) == {arm.name for arm in ARMS}
    assert set(pd.read_csv(record/'selection.csv').arm) == {arm.name for arm in ARMS if arm.data}
    # the first that each reward model chose for
    assert set(pd.read_csv(record/'rewards.csv').arm) == {'sft_own', 'sft_flipped', 'sft_hybrid_same'}
    drawn = {p.name for p in redraw(record, tmp_path)}
    assert {'accuracy.png', 'ablations.svg', 'same.png', 'claims.md', 'selection.md', 'checkpoints.csv', 'cost.png',
            'training.png'} <= drawn


@pytest.mark.slow
def test_seeds_that_retrain_begin_elsewhere(tmp_path, monkeypatch):
    def make_agent(draft, *, name:str, seed:int, share:float): train_tiny(name, seed, draft.path, share=.02)
    monkeypatch.setattr('mapo.experiment.make_agent', make_agent)
    settings = MARS_PO.settings('smoke', **SMALL, retrain=[1])
    steps = compute(Run('retrain', {}, root=tmp_path), MARS_PO, settings, 'base', [0, 1], 'dev')
    keys = {step.seed: set(step.measured['evaluate'][0].read('turns').model_key) for step in steps}
    assert len(keys[0]) == len(keys[1]) == 3 and not keys[0] & keys[1]
    with pytest.raises(ValueError, match='seed 1 trains its models from scratch, which only tiny ones can be'):
        compute(Run('other', {}, root=tmp_path), MARS_PO, replace(settings, agents=('somebody/model',)), 'base', [1],
                'dev')


@pytest.mark.parametrize('how,sentence', [
    (dict(seeds=[0, 0]), r'seeds must be distinct whole numbers, at least one, not \[0, 0\]'),
    (dict(seeds=[]), 'seeds must be distinct whole numbers'),
    (dict(split='train'), "split must be 'dev' or 'test', not 'train'"),
    (dict(arms='mars'), "mars_po has no arm 'mars'")])
def test_what_cannot_be_run_is_refused_first(how, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        compute(Run('refused', {}, root=tmp_path), MARS_PO, MARS_PO.settings('smoke'),
                **dict(arms='core', seeds=[0], split='dev') | how)
    assert not list(tmp_path.rglob('*.parquet'))


@pytest.mark.parametrize('path,sentence', [
    ('tiny:base', "has no score head|is not a reward model|reward"),
    ('./nowhere', "there is no file or folder './nowhere'")])
def test_a_reward_model_that_is_none_is_refused(path, sentence, tmp_path):
    settings = MARS_PO.settings('smoke', **SMALL, reward_model=path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        compute(Run('none', {}, root=tmp_path), MARS_PO, settings, 'mars_po', [0], 'dev')


def asked(run): return {(s['stage'], s['key']) for s in run.stages}


def test_one_more_alpha_trains_again_and_does_not_sample_again(runs):
    first, second = (Run(name, {}, root=runs) for name in ('first', 'second'))
    experiment(first, MARS_PO, MARS_PO.settings('smoke', **ONCE), 'mars_po', [0], 'dev')
    experiment(second, MARS_PO, MARS_PO.settings('smoke', **ONCE | dict(alpha_first=.9)), 'mars_po', [0], 'dev')
    made = [stage for stage, key in asked(second) - asked(first)]
    assert (made.count('train') == 3
            and made.count('sample_alone') == 2), 'only the evaluation of the newly trained agents'


def test_nobody_right_is_one_sentence(tmp_path):
    settings = MARS_PO.settings('smoke', **SMALL | dict(form='a*b*c*d*e'))
    with pytest.raises(ValueError, match='mars_po: nothing to learn for the reward '
                                         'model: problems: 8 nothing to choose'):
        experiment(Run('wrong', {}, root=tmp_path), MARS_PO, settings, 'mars_po', [0], 'dev')


@pytest.mark.parametrize('command,sentence', [
    (['run', 'mars_po', '-p', 'n_sample=3'], "mars_po has no parameter 'n_sample' (did you mean 'n_samples'?)"),
    (['run', 'mars_po', '-p', 'n_samples=three'], "n_samples must be int | None, not 'three'"),
    (['run', 'marspo'], "there is no experiment 'marspo' (did you mean 'mars_po'?)"),
    (['publish', 'mars_po-0'], "there is no run 'mars_po-0'")])
def test_a_mistake_is_one_sentence_and_an_exit_status(command, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv('MAPO_RUNS', str(tmp_path))
    with pytest.raises(SystemExit) as stopped: main(command)
    assert sentence in stopped.value.code and '\n' not in stopped.value.code
    assert not list(tmp_path.rglob('*.parquet'))


def test_the_command_refuses_an_unknown_preset_before_anything_is_computed(tmp_path):
    import os
    out = subprocess.run([str(Path(sys.executable).parent/'mapo'), 'run', 'mars_po', '--preset', 'huge'],
                         capture_output=True, text=True, env=os.environ | dict(MAPO_RUNS=str(tmp_path)))
    assert out.returncode == 1
    assert (out.stderr.strip().splitlines()[-1]
            == "mapo run: mars_po has no preset 'huge': there are smoke, tiny, tiny_routes, small, paper")
    assert not list(tmp_path.rglob('*.parquet')) and not list(tmp_path.rglob('manifest.json'))
