"""The debate's composition: no gold, hostile sizes, what a killed debate keeps; its notebook and its record."""
from dataclasses import fields, replace

import pandas as pd
import pytest

from mapo.cli import checked, settable
from mapo.engines import TransformersEngine
from mapo.experiment import experiment
from mapo.methods import make_problems
from mapo.multiagent_ft import CLAIMS, CORE, MULTIAGENT_FT, MultiagentFT, discuss, learners, multiagent_ft, speakers
from mapo.record import load_record, redraw
from mapo.tables import claims_table
from mapo.runs import Run

SMALL = dict(n_train=6, n_dev=4, n_test=4, n_transfer=4, n_diversity=4, iterations=1, updates=1, batch_size=4,
             transfer='')


def small(**changes): return MULTIAGENT_FT.settings('smoke', **SMALL | changes)


def arm(name): return MULTIAGENT_FT.arm(name)


def test_the_command_offers_every_setting_and_says_what_it_is():
    offered = settable('multiagent_ft')
    assert set(offered) == {f.name for f in fields(MultiagentFT)} and all(about['help'] for about in offered.values())


def test_every_setting_of_every_preset_is_of_the_type_that_is_said():
    for preset in MULTIAGENT_FT.presets.values():
        given = {f.name: getattr(preset, f.name) for f in fields(MultiagentFT)}
        assert MULTIAGENT_FT.settings('tiny', **checked('multiagent_ft', given)['overrides']) == preset


def chosen(run, settings, name, problems):
    [step] = multiagent_ft(run, arm(name).settings(settings), arm(name), 0, problems, 'dev')
    return {f.learner: f.data.read('data').to_dict('list') for f in step.fits}


@pytest.mark.parametrize('name', [pytest.param('multiagent_ft', marks=pytest.mark.slow), 'majority_ft', 'debate_dpo',
                                  'star'])
def test_gold_answers_are_read_by_star_alone(name, runs):
    def spoilt(problems): return problems.assign(answer='-17', solution='no')
    settings = small(temperature=1.)
    run = Run('honest', {}, root=runs)
    problems = run.stage(make_problems, **settings.problem_set())
    honest, blind = (chosen(run, settings, name, asked) for asked in (problems, run.stage(spoilt, problems=problems)))
    assert (str(blind) == str(honest)) == (name != 'star')


@pytest.mark.parametrize('sizes', [dict(seats=1), dict(rounds=1),
                                   pytest.param(dict(seats=2, rounds=3, critic_turns='all agreeing'),
                                                marks=pytest.mark.slow),
                                   pytest.param(dict(lora_rank=2), marks=pytest.mark.slow),
                                   pytest.param(dict(unique_ids='{kind}{seat}'), marks=pytest.mark.slow)])
def test_debates_of_every_size_run_to_the_end(sizes, runs, tmp_path):
    settings = small(**sizes)
    record = experiment(Run('sizes', sizes, root=runs), MULTIAGENT_FT, settings, 'multiagent_ft', [0], 'dev')
    rows = pd.read_parquet(record/'results.parquet')
    assert set(zip(rows.arm, rows.iteration)) == {('base', 0), ('majority', 0), ('debate', 0), ('multiagent_ft', 1)}
    assert redraw(record, tmp_path/'figures')


def test_a_model_without_examples_stays_as_it_is_and_the_table_says_why(runs):
    settings = small(n_train=1, corrected=1.)
    record = experiment(Run('none', {}, root=runs), MULTIAGENT_FT, settings, 'multiagent_ft', [0], 'dev')
    lessons = pd.read_csv(record/'lessons.csv', keep_default_na=False)
    none = lessons[lessons.examples == 0]
    assert len(none) and (none.kept_as_it_was != '').all() and (none.updates == 0).all()


def test_agents_that_all_fail_to_answer_have_no_majority_and_teach_nothing(tmp_path, monkeypatch):
    generate = TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, 'generate', lambda self, requests, sampling: [
        [replace(c, text='') for c in cs] for cs in generate(self, requests, sampling)])
    settings,run = small(),Run('mute', {}, root=tmp_path)
    [step] = multiagent_ft(run, settings, arm('multiagent_ft'), 0, run.stage(make_problems, **settings.problem_set()),
                           'dev')
    votes = step.scores[0].read('votes')
    assert votes.answer.isna().all() and (votes.share == 0).all() and not any(f.training for f in step.fits)
    assert experiment(Run('mute', {}, root=tmp_path), MULTIAGENT_FT, settings, 'multiagent_ft', [0], 'dev')


def test_who_shares_a_model_trains_it_once():
    settings = small()
    assert list(learners(settings, arm('multiagent_ft_no_critics'))) == ['seat-1', 'seat-2', 'seat-3']
    assert learners(settings, arm('single_agent')) == {'one': ('gen-1', 'gen-2', 'gen-3', 'crit-1', 'crit-2', 'crit-3')}


def test_a_debate_killed_in_its_second_round_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = small(chunk_answers=5, summarize=False)
    whole = Run('whole', {}, root=tmp_path/'whole')
    undisturbed = discuss(whole, settings, speakers(settings), whole.stage(make_problems, **settings.problem_set()),
                          'train', 'train', 1, 0, 2)
    calls,generate = [],TransformersEngine.generate
    def dies(self, requests, sampling):
        calls.append(len(requests))
        if len(calls) == 6: raise KeyboardInterrupt
        return generate(self, requests, sampling)
    monkeypatch.setattr(TransformersEngine, 'generate', dies)
    killed = Run('killed', {}, root=tmp_path/'killed')
    problems = killed.stage(make_problems, **settings.problem_set())
    with pytest.raises(KeyboardInterrupt):
        discuss(killed, settings, speakers(settings), problems, 'train', 'train', 1, 0, 2)
    resumed = discuss(killed, settings, speakers(settings), problems, 'train', 'train', 1, 0, 2)
    # 4 + 4 chunks, one of them twice
    assert len(calls) == 9 and resumed.manifest['files'] == undisturbed.manifest['files']


@pytest.mark.slow
def test_core_is_what_its_record_draws(runs, tmp_path):
    "test_papers.py runs the notebook with the same."
    record = experiment(Run('core', {}, root=runs), MULTIAGENT_FT, small(transfer='arithmetic'), 'core', [0], 'dev')
    assert set(pd.read_parquet(record/'results.parquet').arm) == set(CORE)
    drawn = {p.name for p in redraw(record, tmp_path/'figures')}
    assert {'accuracy.png', 'readouts.png', 'diversity.png', 'claims.md', 'comparisons.md', 'results.md',
            'cost.svg'} <= drawn
    readouts = pd.read_csv(record/'readouts.csv')
    assert set(readouts.readout) == {'alone', 'vote', 'debate', 'alone, greedy'}
    calls = pd.read_csv(record/'inference.csv').groupby('arm').calls.first()
    assert calls[['base', 'majority', 'majority_ft', 'debate']].tolist() == [1, 3, 3, 9], 'three summaries in a debate'


@pytest.mark.parametrize('updates', [0, 1])
def test_no_comparison_holds_an_arm_against_itself(updates, tmp_path):
    "Updates by epochs make `single_agent_total` another name of `single_agent`."
    record = experiment(Run('total', dict(updates=updates), root=tmp_path), MULTIAGENT_FT,
                        small(updates=updates, epochs=1.), 'single_agent,single_agent_total,multiagent_ft', [0], 'dev')
    rows, _, manifest = load_record(record)
    one, total = (rows[rows.arm == arm].drop(columns='arm').reset_index(drop=True)
                  for arm in ('single_agent', 'single_agent_total'))
    assert not updates or ['multiagent_ft', 'single_agent_total'] in manifest['comparisons']
    if updates: return
    assert one.equals(total), 'they are the same arm'
    assert manifest['not_compared'] == [['multiagent_ft', 'single_agent_total',
                                         'which is Multiagent FT against single-agent FT under these settings']]
    assert ['multiagent_ft', 'single_agent_total'] not in manifest['comparisons']
    assert ['multiagent_ft', 'single_agent'] in manifest['comparisons']
    verdict, = claims_table([c for c in manifest['claims']
                             if c['tests'] == [['multiagent_ft@1', 'single_agent_total@1']]], rows).verdict
    assert verdict.startswith('not testable here: it holds Multiagent FT, iteration 1 against single-agent FT, equal '
                              'total updates, iteration 1')
    redraw(record, tmp_path/'figures')
    assert 'Not compared: Multiagent FT and single-agent FT, equal total updates' in (
        tmp_path/'figures'/'comparisons.md').read_text()


def test_claims_of_one_iteration_are_read_after_the_first():
    for claim in CLAIMS:
        trained = [side for test in claim['tests'] for side in test if arm(side.partition('@')[0]).models
                   and not arm(side.partition('@')[0]).settings(MULTIAGENT_FT.presets['tiny']).iterations == 1]
        assert all('@' in side for side in trained), claim['claim']
