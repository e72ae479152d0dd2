"""The debate's composition: no gold, hostile sizes, what a killed debate keeps; its notebook and its record."""
from dataclasses import fields, replace

import pandas as pd
import pytest

from mapo.cli import checked, notebook, parameters
from mapo.engines import TransformersEngine
from mapo.multiagent_ft import (ARMS, CORE, MULTIAGENT_FT, MultiagentFT, learners, multiagent_ft, multiagent_ft_experiment, multiagent_ft_settings,
                                problem_set, speakers, talk)
from mapo.report import redraw
from mapo.runs import Run, stage

SMALL = dict(n_train=6, n_dev=4, n_test=4, n_transfer=4, n_diversity=4, iterations=1, updates=1, batch_size=4, transfer='')


def small(**changes): return multiagent_ft_settings('smoke', **SMALL | changes)


def test_the_notebook_offers_every_setting_and_nothing_else():
    offered = set(parameters(notebook('multiagent_ft'))) - {'preset', 'arms', 'seeds', 'split', 'record'}
    assert offered == {f.name for f in fields(MultiagentFT)}


def test_every_setting_of_every_preset_is_of_the_type_the_notebook_says():
    for preset in MULTIAGENT_FT.values():
        given = {f.name: getattr(preset, f.name) for f in fields(MultiagentFT)}
        assert multiagent_ft_settings('tiny', **{k: v for k, v in checked('multiagent_ft', given).items() if k in given}) == preset


def chosen(run, settings, arm):
    problems = problem_set(run, settings)
    steps = multiagent_ft(run, settings, ARMS[arm], 0, problems, 'dev')
    return {name: artifact.read('data').to_dict('list') for name, artifact in steps[0]['lessons'].items()}


@pytest.mark.parametrize('arm', [pytest.param('multiagent_ft', marks=pytest.mark.slow), 'majority_ft', 'debate_dpo', 'star'])
def test_gold_answers_are_read_by_star_alone(arm, runs, monkeypatch):
    @stage()
    def spoilt(draft, *, problems): draft.write('problems', problems.read('problems').assign(answer='-17', solution='no'))
    settings = small(temperature=1.)
    honest = chosen(Run('honest', {}, root=runs), settings, arm)
    monkeypatch.setattr('mapo.multiagent_ft.problem_set', lambda run, s: None)
    run = Run('spoilt', {}, root=runs)
    steps = multiagent_ft(run, settings, ARMS[arm], 0, run.stage(spoilt, problems=problem_set(run, settings)), 'dev')
    blind = {name: artifact.read('data').to_dict('list') for name, artifact in steps[0]['lessons'].items()}
    assert (str(blind) == str(honest)) == (arm != 'star')


@pytest.mark.parametrize('sizes', [dict(seats=1), dict(rounds=1), pytest.param(dict(seats=2, rounds=3, critic_turns='all agreeing'), marks=pytest.mark.slow),
                                   pytest.param(dict(lora_rank=2), marks=pytest.mark.slow), pytest.param(dict(unique_ids='{kind}{seat}'), marks=pytest.mark.slow)])
def test_debates_of_every_size_run_to_the_end(sizes, runs, tmp_path):
    settings = small(**sizes)
    record = multiagent_ft_experiment(Run('sizes', sizes, root=runs), settings, 'multiagent_ft', [0], 'dev')
    rows = pd.read_parquet(record/'results.parquet')
    assert set(zip(rows.arm, rows.iteration)) == {('base', 0), ('majority', 0), ('debate', 0), ('multiagent_ft', 1)}
    assert redraw(record, tmp_path/'figures')


def test_a_model_without_examples_stays_as_it_is_and_the_table_says_why(runs):
    settings = small(n_train=1, corrected=1.)
    record = multiagent_ft_experiment(Run('none', {}, root=runs), settings, 'multiagent_ft', [0], 'dev')
    lessons = pd.read_csv(record/'lessons.csv', keep_default_na=False)
    none = lessons[lessons.examples == 0]
    assert len(none) and (none.kept_as_it_was != '').all() and (none.updates == 0).all()


def test_agents_that_all_fail_to_answer_have_no_majority_and_teach_nothing(tmp_path, monkeypatch):
    generate = TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, 'generate', lambda self, requests, sampling: [[replace(c, text='') for c in cs] for cs in generate(self, requests, sampling)])
    settings,run = small(),Run('mute', {}, root=tmp_path)
    steps = multiagent_ft(run, settings, ARMS['multiagent_ft'], 0, problem_set(run, settings), 'dev')
    votes = steps[0]['scores'][0].read('votes')
    assert votes.answer.isna().all() and (votes.share == 0).all() and not steps[0]['made']
    assert multiagent_ft_experiment(Run('mute', {}, root=tmp_path), settings, 'multiagent_ft', [0], 'dev')


def test_who_shares_a_model_trains_it_once():
    settings = small()
    assert list(learners(settings, ARMS['multiagent_ft_no_critics'])) == ['seat-1', 'seat-2', 'seat-3']
    assert learners(settings, ARMS['single_agent']) == {'one': ('gen-1', 'gen-2', 'gen-3', 'crit-1', 'crit-2', 'crit-3')}


def test_a_debate_killed_in_its_second_round_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = small(chunk_answers=5, summarize=False)
    whole = Run('whole', {}, root=tmp_path/'whole')
    undisturbed = talk(whole, settings, speakers(settings), problem_set(whole, settings), 'train', 'train', 1, 0, 2)
    calls,generate = [],TransformersEngine.generate
    def dies(self, requests, sampling):
        calls.append(len(requests))
        if len(calls) == 6: raise KeyboardInterrupt
        return generate(self, requests, sampling)
    monkeypatch.setattr(TransformersEngine, 'generate', dies)
    killed = Run('killed', {}, root=tmp_path/'killed')
    problems = problem_set(killed, settings)
    with pytest.raises(KeyboardInterrupt): talk(killed, settings, speakers(settings), problems, 'train', 'train', 1, 0, 2)
    resumed = talk(killed, settings, speakers(settings), problems, 'train', 'train', 1, 0, 2)
    assert len(calls) == 9 and resumed.manifest['files'] == undisturbed.manifest['files'] # 4 + 4 chunks, one of them twice


@pytest.mark.slow
def test_core_is_what_its_record_draws(runs, tmp_path):
    "test_papers.py runs the notebook with the same."
    record = multiagent_ft_experiment(Run('core', {}, root=runs), small(transfer='arithmetic'), 'core', [0], 'dev')
    assert set(pd.read_parquet(record/'results.parquet').arm) == set(CORE)
    drawn = {p.name for p in redraw(record, tmp_path/'figures')}
    assert {'accuracy.png', 'readouts.png', 'diversity.png', 'claims.md', 'comparisons.md', 'results.md', 'cost.svg'} <= drawn
    readouts = pd.read_csv(record/'readouts.csv')
    assert set(readouts.readout) == {'alone', 'vote', 'debate', 'alone, greedy'}
