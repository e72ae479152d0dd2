"""Figures draw what tables hold, without overlap; `make figures` makes every committed figure, table and page again."""
import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text as Words

from conftest import REPO
from mapo import cli
from mapo.cli import main, notebooks
from mapo.figures import (boxes_of_pairs, figure_style, plot_accuracy, plot_agents, plot_arms, plot_cost,
                          plot_diversity, plot_flips, plot_group, plot_method, plot_rates, plot_readouts, plot_sweep,
                          plot_training, save_figure)
from mapo.malt import MALT
from mapo.mars_po import MARS_PO
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.record import figure_arms, method_boxes
from mapo.tables import base_arms, diversity_table, flips_table, readouts_table, sweep_table
from warm import Warm
from written import (costs, debates, everything, figures, hostile, rows, team,  # noqa: F401 fixtures among them
                     teams, trees)

RECORDS = sorted(p.parent.name for p in (REPO/'figures'/'record').glob('*/manifest.json'))
PAPERS = [name for name in RECORDS if name in notebooks()]

DRAW = '''
import sys
from pathlib import Path
from mapo.record import redraw
for file in redraw(Path('figures')/'record'/sys.argv[1], Path('figures')/sys.argv[1]): print(file.name)
'''
SHOW = '''
import sys
from mapo.cli import draw_notebook
draw_notebook(sys.argv[1])
'''


def run(code, name, copy):
    code, said = Warm(code, name, said=copy.parent/'said', cwd=copy, PYTHONPATH=copy).wait()
    assert code == 0, said
    return said


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.xdist_group(f'figures of {n}')) for n in RECORDS])
def test_figures_are_what_the_record_draws(name, copy):
    shown = {p.name: p.read_bytes() for p in (copy/'figures'/name).glob('*')}
    for file in shown: (copy/'figures'/name/file).unlink()
    run(DRAW, name, copy)
    drawn = {p.name: p.read_bytes() for p in (copy/'figures'/name).glob('*')}
    stale = [n for n in shown if shown[n] != drawn.get(n)]
    assert drawn.keys() == shown.keys() and not stale, (
        f'figures/{name} is not what its record draws; run `make figures`')


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.xdist_group(f'notebook of {n}')) for n in PAPERS])
def test_a_paper_shows_its_record(name, copy):
    path = copy/'nbs'/'papers'/f'{name}.ipynb'
    before = path.read_text()
    path.write_text(json.dumps(emptied(before)))
    run(SHOW, name, copy)
    assert path.read_text() == before, (
        f'nbs/papers/{name}.ipynb does not show what its record draws; run `make figures`')
    said = json.dumps([c.get('outputs') for c in json.loads(before)['cells']])
    assert json.loads((copy/'figures'/'record'/name/'manifest.json').read_text())['run'] in said, (
        f'nbs/papers/{name}.ipynb does not show the run of its record')


def emptied(text):
    notebook = json.loads(text)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    return notebook


def test_the_command_draws_every_record_and_every_paper(monkeypatch, capsys):
    "Each by the functions that are tested above."
    drawn, shown = [], []
    monkeypatch.setattr('mapo.record.redraw', lambda record, folder: drawn.append((record, folder)))
    monkeypatch.setattr(cli, 'draw_notebook', shown.append)
    main(['figures'])
    assert drawn == [(REPO/'figures'/'record'/name, REPO/'figures'/name) for name in RECORDS] and shown == PAPERS
    assert len(capsys.readouterr().out.splitlines()) == len(RECORDS) > 0


def texts(figure):
    "Every text of a figure that is drawn, with its box."
    FigureCanvasAgg(figure).draw()
    hidden = {id(t) for axes in figure.axes if not axes.get_visible() for t in axes.findobj(Words)}
    return [(t.get_text(), t.get_window_extent()) for t in figure.findobj(Words) if id(t) not in hidden
            and t.get_visible() and t.get_text().strip() and t.get_window_extent().width > 0]


def apart(figure):
    "No text leaves the figure or covers another."
    with figure_style(): found = texts(figure)
    words = [(t, b) for t, b in found if any(c.isalpha() for c in t) and '$' not in t]
    assert len(words) >= 5
    for i, (one, a) in enumerate(words):
        assert a.x0 >= -1 and a.x1 <= figure.bbox.x1 + 1 and a.y0 >= -1 and a.y1 <= figure.bbox.y1 + 1, one
        for other, b in words[i+1:]:
            assert (a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1
                    or b.y1 <= a.y0 + 1), f'{one!r} covers {other!r}'


def test_edges_draw(rows, tmp_path):
    save_figure(plot_accuracy(rows[rows.arm == 'base']), tmp_path, 'base_only')
    save_figure(plot_accuracy(rows[rows.arm != 'base']), tmp_path, 'no_base')
    save_figure(plot_agents(team('lonely', {1: dict(a=1.)}, seeds=[0])), tmp_path, 'one_agent_all_right')


def test_seventeen_arms_are_drawn_without_overlap(everything):
    rows = everything['rows']
    drawn = figure_arms(rows, figures(MARS_PO, rows))
    shown = ([plot_group(rows[rows.arm.isin(drawn[name])]) for name in ('accuracy', 'ablations', 'same', 'agents')]
             + [plot_cost(rows, everything['costs']), plot_training(everything['training'], '', drawn['training']),
                plot_rates(everything['rates'])])
    for figure in shown: apart(figure)


def test_a_line_begins_at_the_base_of_its_team(everything):
    rows = everything['rows']
    figure = plot_accuracy(rows[rows.arm.isin(['base', 'base_same', 'mars_po', 'mars_po_same'])])
    start = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert start['Mars-PO, equal weaknesses'] == start['base, equal weaknesses'] < start['base'] == start['Mars-PO']


def test_a_debate_begins_where_it_was_untrained(debates):
    rows, begin = debates['rows'], dict(bases=dict(multiagent_ft='debate', single_agent='debate'))
    base = base_arms(rows, begin)
    drawn = figure_arms(rows, begin | figures(MULTIAGENT_FT, rows))
    assert [*drawn] == ['accuracy', 'ablations', 'seats', 'preferences', 'controls', 'lessons', 'readouts', 'diversity']
    axes = plot_accuracy(rows[rows.arm.isin(drawn['accuracy'])], base=base).axes[0]
    start = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert start['Multiagent FT'] == start['debate'] != start['STaR'] == start['base']
    assert axes.get_ylabel() == 'team accuracy' and axes.get_xticklabels()[0].get_text() == 'untrained'
    labels = [t.get_text() for t in axes.texts]
    assert any(t.startswith('debate  ') for t in labels) and any(t.startswith('base  ') for t in labels)


def test_an_arm_measured_late_has_no_line_to_the_start():
    rows = teams(dict(debate={0: .5}, multiagent_ft={1: .6, 2: .7, 3: .8}, multiagent_ft_no_interaction={3: .6}))
    figure = plot_accuracy(rows, base=base_arms(rows))
    assert [len(line.get_xdata()) for line in figure.axes[0].lines
            if line.get_label() == 'Multiagent FT, no interaction'] == [1]
    assert figure.axes[0].get_xticklabels()[0].get_text() == 'debate'


def test_figures_of_debates_and_trees_are_drawn_without_overlap(debates, trees):
    rows = debates['rows']
    drawn = figure_arms(rows, figures(MULTIAGENT_FT, rows))
    shown = [plot_group(rows[rows.arm.isin(drawn[name])])
             for name in ('accuracy', 'ablations', 'seats', 'preferences', 'controls', 'lessons')]
    shown += [plot_diversity(debates['diversity'], 'run', drawn['diversity']),
              plot_readouts(debates['readouts'], 'run')]
    shown += [plot_diversity(debates['diversity'].query(f"measure == '{m}'"), 'run', drawn['diversity'])
              for m in ('consensus', 'kl')]
    shown += [plot_arms(trees['rows'], run='run'), plot_readouts(trees['readouts'], 'run'),
              plot_flips(trees['flips'], 'run'), plot_sweep(trees['sweep'], 'run'),
              plot_sweep(trees['sweep'].query("setting == 'votes'"))]
    for figure in shown: apart(figure)


further = dict(diversity=(plot_diversity, diversity_table), readouts=(plot_readouts, readouts_table),
               flips=(plot_flips, flips_table), sweep=(plot_sweep, sweep_table))
used = dict(diversity=['arm', 'seed', 'iteration', 'measure', 'round', 'mean', 'low', 'high', 'se', 'problems'],
            readouts=['arm', 'iteration', 'readout', 'accuracy', 'low', 'high'],
            flips=['arm', 'iteration', 'flip', 'share', 'low', 'high'],
            sweep=['setting', 'value', 'arm', 'accuracy', 'low', 'high'])


@pytest.mark.parametrize('name', further)
def test_a_table_that_is_not_right_is_one_sentence(name, debates, trees):
    table = (debates | trees)[name]
    for show in further[name]:
        for column in used[name]:
            with pytest.raises(ValueError, match=f"the {name} table has no column '{column}'; it needs"):
                show(table.drop(columns=column))
        with pytest.raises(ValueError, match=f'the {name} table has no rows'): show(table[:0])
        with pytest.raises(ValueError, match=f'rows of the {name} table are there twice'):
            show(pd.concat([table, table[:1]]))


def test_names_are_drawn_as_they_are(debates, trees):
    "No name in a record is read as a formula or acts on what is around it."
    def named(table, column):
        names = list(dict.fromkeys(table[column]))[:len(hostile)]
        return table.assign(**{column: table[column].replace(dict(zip(names, hostile)))})
    rows, diversity = named(trees['rows'], 'arm'), debates['diversity']
    figures = [plot_arms(rows), plot_accuracy(rows), plot_diversity(named(diversity, 'arm'), shown=hostile),
               plot_diversity(named(diversity, 'measure')), plot_readouts(named(trees['readouts'], 'readout')),
               plot_flips(named(trees['flips'], 'arm')), plot_sweep(named(trees['sweep'], 'setting'), hostile[4])]
    for figure in figures:
        with figure_style(): words = [t for t in figure.findobj(Words) if t.get_text()]
        for one in words:
            assert not {*'\x1b\x00\u202e'} & {*one.get_text()}
            assert re.sub(r'\\\$', '', one.get_text()).count('$') in (0, 1)
        with figure_style(): FigureCanvasAgg(figure).draw()
    assert any('x^2' in t.get_text() for t in figures[0].findobj(Words))


def test_every_flip_has_its_interval(trees):
    panels = plot_flips(trees['flips'], shown=['malt']).axes
    drawn = [[tuple(segment[:, 0]) for bars in axes.collections for segment in bars.get_segments()] for axes in panels]
    own = trees['flips'][trees['flips'].arm == 'malt'].set_index('flip')
    ends = lambda flip: (own.low[flip], own.high[flip])
    assert np.allclose(drawn[0], [ends('wrong to right'), ends('right to wrong')])
    assert np.allclose(drawn[1], [ends('right to right'), ends('wrong to wrong')])


def test_leaders_to_names_do_not_cross(debates):
    "Each runs level to one place, and from there in the order of the names."
    rows = debates['rows'][debates['rows'].arm.isin(['base', 'debate', 'star', 'majority_ft', 'multiagent_ft'])]
    axes = plot_accuracy(rows, base=base_arms(rows, dict(bases=dict(multiagent_ft='debate')))).axes[0]
    edge = axes.get_xlim()[1]
    leaders = [line.get_xydata()[-2:] for line in axes.lines if len(line.get_xydata()) > 1 and np.isclose(
        line.get_xdata()[-1], edge)]
    assert len(leaders) == 5 and len({round(start[0], 9) for start, _ in leaders}) == 1
    begin, end = ([leader[k][1] for leader in leaders] for k in (0, 1))
    assert [*np.argsort(begin)] == [*np.argsort(end)]


def test_a_method_is_drawn_whatever_its_texts_say():
    "Every box lies in the figure, and no text of a model is read as a formula."
    say = lambda text: [dict(role='user', content=text)]
    pairs = pd.DataFrame([dict(prompt=say(text*20), chosen=say(text*40), rejected=say('$' + text), problem_id='p',
                               agent=f'a{i}', chosen_agent='ann', rejected_agent=f'a{i}')
                          for i, text in enumerate(hostile)])
    figure = plot_method(boxes_of_pairs(pairs), 'run')
    with figure_style(): found = texts(figure)
    for text, box in found:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
        assert text.replace('\\$', '').count('$') == 0 and not {*'\x1b\x00\u202e'} & {*text}
    for record in PAPERS: # texts stay inside their boxes
        boxes = method_boxes(REPO/'figures'/'record'/record)
        if boxes is None: continue
        figure = plot_method(boxes, 'run')
        with figure_style(): words = texts(figure)
        patches = [p.get_window_extent() for p in figure.axes[0].patches]
        for text, box in words:
            own = [p for p in patches if p.x0 <= box.x0 <= p.x1 and p.y0 <= (box.y0 + box.y1)/2 <= p.y1]
            assert all(box.x1 <= p.x1 + 1 and box.y0 >= p.y0 - 1 for p in own), text


def test_swept_words_stand_side_by_side(trees):
    words = pd.DataFrame([dict(setting='order', value=v, arm='malt', accuracy=.6, low=.5, high=.7)
                          for v in ('a', 'b', 'c')])
    first, second = plot_sweep(pd.concat([words,
                                          trees['sweep'].query("setting == 'threshold'").astype(dict(value=str))])).axes
    said = [[t.get_text() for t in axes.get_yticklabels()] for axes in (first, second)]
    assert said == [['a', 'b', 'c'], ['0.3', '0.5', '0.7']]
