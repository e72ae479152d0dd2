"""Figures and tables are the same bytes from the same record, and no model text is ever interpreted."""
import html.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text as Words

from mapo.experiment import drawable
from mapo.malt import MALT
from mapo.mars_po import MARS_PO
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.report import (arm_label, arm_style, arms, average_diversity, base_arms, choose_rates, claims_table, compare_to_record, comparisons_table, correct_record, diversity_table, escape, figure_arms, figure_style, flag_failures, flag_selection,
                         flips_table, formatted, know_arms, load_record, markdown, plot_accuracy, plot_agents, plot_arms, plot_cost, plot_diversity, plot_flips, plot_rates, plot_readouts, plot_sweep, plot_training, printable,
                         readouts_table, redraw, results_table, save_figure, save_record, save_table, show_pairs, show_table, sweep_table)

for experiment in (MARS_PO, MULTIAGENT_FT, MALT): know_arms([arm.drawn() for arm in experiment.arms])

manifest = dict(run='0a1b2c3d', command='mapo run mars_po', arms=[arm.drawn() for arm in MARS_PO.arms], commit='f00', parameters={'alpha': .1}, hardware='a test',
                comparisons=[['mars_po', 'dpo']], seeds_vary='A seed varies the draw.',
                claims=[dict(claim='better', paper='none', refuted_if='worse', tests=[['mars_po', 'dpo']])])


def team(arm, levels, seeds=(0, 1), problems=60, greedy=True):
    "Compact rows; levels[iteration][agent] is the expected accuracy."
    rng = np.random.default_rng(abs(hash_of(arm)))
    return pd.DataFrame([dict(arm=arm, seed=s, iteration=t, agent=agent, problem_id=f'p{i:02}', n=8, c=int(rng.binomial(8, p)), greedy=float(rng.random() < p) if greedy else np.nan)
                         for s in seeds for t, agents in levels.items() for agent, p in agents.items() for i in range(problems)])


def hash_of(text): return sum(map(ord, text))


def figures(experiment, rows):
    "What a manifest says of figures."
    return dict(figures=drawable(experiment.figures, set(rows.arm)))


@pytest.fixture(scope='module')
def rows():
    return pd.concat([team('base', {0: dict(a=.5, b=.6)}), team('dpo', {1: dict(a=.7, b=.7), 2: dict(a=.6, b=.35)}), team('mars_po', {1: dict(a=.7, b=.7), 2: dict(a=.8, b=.85)})], ignore_index=True)


@pytest.fixture(scope='module')
def costs():
    return pd.DataFrame([dict(arm=a, seed=s, tokens_sampled=1000, tokens_trained=500*s, updates=10) for a in ('dpo', 'mars_po') for s in (0, 1)])


@pytest.fixture(scope='module')
def record(rows, costs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('record')
    save_record(folder, rows, costs, manifest)
    return folder


def same_files(one, two):
    names = sorted(p.name for p in Path(one).iterdir())
    assert names == sorted(p.name for p in Path(two).iterdir()) and len(names) >= 14
    for name in names: assert (Path(one)/name).read_bytes() == (Path(two)/name).read_bytes(), name


def test_redraw_gives_the_same_bytes_whatever_the_settings_and_process(record, tmp_path):
    redraw(record, tmp_path/'one')
    with mpl.rc_context({'font.size': 20, 'axes.facecolor': 'red', 'svg.hashsalt': 'other', 'savefig.dpi': 30, 'lines.linewidth': 9}): redraw(record, tmp_path/'two')
    same_files(tmp_path/'one', tmp_path/'two')
    code = f'from mapo.report import redraw; redraw({str(record)!r}, {str(tmp_path/"three")!r}); import sys; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONHASHSEED': '7', 'TZ': 'Asia/Tokyo'}, cwd=tmp_path)
    same_files(tmp_path/'one', tmp_path/'three')


def test_record_bytes_do_not_depend_on_row_order(rows, costs, record, tmp_path):
    save_record(tmp_path, rows.sample(frac=1, random_state=0), costs.iloc[::-1], manifest)
    for file in record.iterdir(): assert file.read_bytes() == (tmp_path/file.name).read_bytes(), file.name


def test_every_file_names_the_run_and_none_a_date(record, tmp_path):
    for file in redraw(record, tmp_path):
        data = file.read_bytes()
        if file.suffix != '.csv': assert b'0a1b2c3d' in data, file.name
        assert b'Matplotlib v' not in data and b'<dc:date>' not in data and b'Software' not in data


def test_record_missing_a_file_is_one_sentence(record, tmp_path):
    (tmp_path/'results.parquet').write_bytes((record/'results.parquet').read_bytes())
    with pytest.raises(FileNotFoundError, match='budget.csv, manifest.json'): load_record(tmp_path)


def test_edges_draw(rows, tmp_path):
    base = rows[rows.arm == 'base']
    save_figure(plot_accuracy(base), tmp_path, 'base_only')
    save_figure(plot_accuracy(rows[rows.arm != 'base']), tmp_path, 'no_base')
    save_figure(plot_agents(team('lonely', {1: dict(a=1.)}, seeds=[0])), tmp_path, 'one_agent_all_right')
    assert flag_failures(base).empty and markdown(formatted(flag_failures(base))).startswith('| arm |')
    assert 'greedy' not in results_table(rows.assign(greedy=np.nan))
    save_table(results_table(rows), tmp_path, 'no_costs')


class Text(html.parser.HTMLParser):
    "Collects the tags a browser would see, and the text."
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.words = set(), ''
    def handle_starttag(self, tag, attrs): self.tags |= {tag, *(name for name, _ in attrs if name.startswith('on'))}
    def handle_data(self, data): self.words += data


hostile = ['<script>alert(1)</script>', '</pre></div><img src=x onerror=alert(1)>', '&lt;script&gt;', '**bold** _it_ `code`\n\n# title\n\n- item', '$x^2$ \\(y\\) $$z$$', '| a | b |\n|---|---|',
           '\x1b[2J\x1b[31mred', '\u202egnp.exe', '\x00\x07', ']]>', '<!--', 'ok\r\nline']


@pytest.mark.parametrize('text', hostile)
def test_model_text_is_never_interpreted(text):
    say = lambda role: [dict(role=role, content=text)]
    shown = show_pairs(pd.DataFrame([dict(prompt=say('user'), chosen=say('assistant'), rejected=say('assistant'), problem_id=text, agent=text, chosen_agent=text, rejected_agent=text)]))
    page = Text()
    page.feed(shown.html)
    page.close()
    assert page.tags == {'div', 'pre', 'b'}
    assert page.words.count(printable(text)) == 7
    for c in '$*`|_\n#': assert c not in escape(text).replace('&#', '')
    for c in '\x1b\x00\x07\u202e\r': assert c not in repr(shown) and c not in shown.html
    escape('\ud800').encode('utf-8')
    table = show_table(pd.DataFrame(dict(claim=[text])), 'fixed-id', note=text)
    page = Text()
    page.feed(table.html)
    assert page.tags == {'div', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'p'} and '<table id="fixed&#45;id">' in table.html
    cells = markdown(formatted(pd.DataFrame(dict(claim=[text])))).splitlines()
    assert len(cells) == 3 and not re.search(r'(?<!\\)[*_$`<]', cells[2])


def test_endless_text_is_cut_and_says_so():
    say = lambda text: [dict(role='assistant', content=text)]
    shown = show_pairs(pd.DataFrame([dict(prompt=say('q'), chosen=say('x'*2_000_000), rejected=say(''), problem_id='p', agent='a', chosen_agent='a', rejected_agent='b')]))
    assert '2,000,000 characters' in html.unescape(shown.html) and '2,000,000 characters' in repr(shown) and len(shown.html) < 10_000
    assert repr(show_pairs(pd.DataFrame())) == 'no pairs'


def test_failures_are_found_by_name(rows):
    flags = flag_failures(rows).set_index(['arm', 'failure', 'agent'])
    assert flags.loc[('dpo', 'falls after iteration 1', 'team'), 'difference'] < -.1
    assert flags.loc[('dpo', 'agent below its base', 'b'), 'difference'] < -.15
    assert not any('falls' in f or 'below' in f for a, f, _ in flags.index if a == 'mars_po')


def test_a_repeated_run_agrees_with_itself_and_not_with_a_worse_one(rows):
    assert compare_to_record(rows, rows).agrees.all()
    worse = compare_to_record(rows.assign(c=rows.c.where(rows.arm != 'mars_po', rows.c // 2)), rows)
    assert not worse[worse.arm == 'mars_po'].agrees.any() and worse[worse.arm != 'mars_po'].agrees.all()
    assert compare_to_record(rows[rows.seed == 0], rows).agrees.all()


def test_a_claim_needs_its_arms_and_more_than_one_seed(rows):
    claim = lambda **of: dict(paper='none', refuted_if='worse') | of
    claims = [claim(claim='without NLL', tests=[['mars_po', 'mars_po_no_nll']]),
              claim(claim='rises', tests=[['mars_po@2', 'mars_po@1'], ['mars_po@9', 'mars_po@1']])]
    one, rises, _ = claims_table(claims, rows).verdict
    assert one == 'not testable here: this run has no Mars-PO without NLL'
    assert rises == 'not testable here: this run has no Mars-PO, iteration 9'
    one = claims_table(manifest['claims'], rows[rows.seed == 0], manifest['comparisons'])
    assert [*one.verdict] == ['undecided: these checkpoints only'] and one.p_holm[0] < .05


def test_a_claim_of_several_tests_holds_only_whole():
    levels = {0: dict(a=.5, b=.5)}
    rows = pd.concat([team('base', levels, seeds=range(6)), team('mars_po', {1: dict(a=.8, b=.2)}, seeds=range(6)), team('dpo', {1: dict(a=.8, b=.8)}, seeds=range(6))])
    claim = lambda arm: dict(claim=f'both gain under {arm}', paper='none', refuted_if='one loses',
                             tests=[[f'{arm}:{n}', f'base:{n}'] for n in 'ab'])
    judged = claims_table([claim('mars_po'), claim('dpo')], rows)
    assert [*judged.verdict] == ['fails']*2 + ['holds']*2
    assert {*judged.family} == {'further'}
    with_primary = claims_table([claim('dpo')], rows, [('dpo:a', 'base:a')])
    assert [*with_primary.family] == ['primary', 'further'] and with_primary.p_holm[1] < judged.p_holm[3]  # two families of one test, no family of four


def drawn(differences, seeds=3, problems=50):
    "Compact rows of arms `a` and `b` whose sampled and greedy accuracy differ by what is given, seed by seed."
    share = lambda arm, metric, s: .5 + (differences[metric][s] if arm == 'a' else 0)
    row = lambda arm, s, i: dict(arm=arm, seed=s, iteration=int(arm == 'a'), agent='team', problem_id=f'p{i:02}', n=100,
                                 c=round(100*share(arm, 'sampled', s)), greedy=float(i < problems*share(arm, 'greedy', s)))
    return pd.DataFrame([row(arm, s, i) for arm in 'ab' for s in range(seeds) for i in range(problems)])


@pytest.mark.parametrize('sampled, greedy, verdict', [
    ([.1, .11, .12], [.1, .12, .14], 'holds'),
    ([-.1, -.11, -.12], [-.1, -.12, -.14], 'fails'),
    ([-.1, .1, .05], [.1, -.1, .02], 'undecided'),
    ([-.1, -.11, -.12], [.1, -.1, .02], 'fails sampled, undecided greedy'),
    ([.1, .11, .12], [-.1, -.12, -.14], 'holds sampled, fails greedy')])
def test_a_verdict_is_of_sampled_and_of_greedy_answers(sampled, greedy, verdict):
    claims = [dict(claim='better', paper='none', refuted_if='worse', tests=[['a', 'b']])]
    assert claims_table(claims, drawn(dict(sampled=sampled, greedy=greedy))).verdict[0] == verdict


def test_a_loss_is_not_hidden_behind_the_number_of_tests():
    "A loss that is undecided among all tests fails its own claim; a gain of the same size does not make one hold."
    rows = drawn(dict(sampled=[-.05, -.1, -.07], greedy=[0, 0, 0])).assign(greedy=np.nan)
    more = pd.concat([rows, *(rows[rows.arm == 'a'].assign(arm=f'a{i}') for i in range(9))], ignore_index=True)
    claim = lambda *test: dict(claim=f'{test}', paper='none', refuted_if='worse', tests=[[*test]])
    judged = claims_table([claim('a', 'b'), claim('b', 'a1'), *(claim(f'a{i}', 'b') for i in range(9))], more)
    assert (judged.p_holm > .05).all() and judged.verdict[0] == 'fails' and judged.verdict[1] == 'undecided'


def test_a_claim_says_what_counts_against_it_and_whether_its_control_was_trained(rows):
    both = dict(claim='both', paper='none', refuted_if='worse', tests=[['mars_po', 'dpo'], ['mars_po', 'base']])
    judged = claims_table([both], rows)
    assert [*judged.control] == ['trained', 'untrained'] and [*judged.refuted_if] == ['worse']*2
    with pytest.raises(ValueError, match="claim 'idle' does not say what would count against it"):
        claims_table([dict(claim='idle', paper='none', tests=[['mars_po', 'dpo']])], rows)


def test_a_reason_stands_where_a_claim_cannot_be_tested(rows):
    claim = dict(claim='rises', paper='none', refuted_if='falls', tests=[['mars_po', 'base']])
    judged = claims_table([claim | dict(untestable='nothing was learnt')], rows)
    assert judged.verdict[0] == 'not testable here: nothing was learnt' and judged.difference.notna().all()
    itself = claims_table([claim | dict(tests=[['mars_po', 'mars_po@2']])], rows).verdict[0]
    assert itself == 'not testable here: Mars-PO and Mars-PO, iteration 2 are the same here'


def test_no_comparison_holds_an_arm_against_itself(rows):
    for pair in (('mars_po', 'mars_po'), ('mars_po', 'mars_po@2'), ('base:a', 'base@0:a')):
        with pytest.raises(ValueError, match='an arm is not held against itself'): comparisons_table(rows, [pair])


def test_controls_that_came_afterwards_are_marked_and_corrected_by_themselves(rows):
    table = comparisons_table(rows, [('mars_po', 'dpo')], [('mars_po', 'base'), ('dpo', 'base')])
    assert [*table.named] == ['beforehand', 'afterwards', 'afterwards'] and table.p_holm[0] == table.p[0]
    assert 'named' not in comparisons_table(rows, [('mars_po', 'dpo')])
    assert {'greedy', 'greedy_low', 'greedy_p_holm'} <= {*table}
    assert 'greedy' not in comparisons_table(rows.assign(greedy=np.nan), [('mars_po', 'dpo')])


def test_a_corrected_record_keeps_its_results_and_says_what_was_wrong(record, tmp_path):
    shutil.copytree(record, tmp_path/'record')
    claims = [manifest['claims'][0] | dict(claim='better than its base', tests=[['mars_po', 'base']])]
    correct_record(tmp_path/'record', '2026-11-28', 'The control was another one.', claims=claims)
    changed = [p.name for p in sorted(record.iterdir()) if p.read_bytes() != (tmp_path/'record'/p.name).read_bytes()]
    assert changed == ['manifest.json']
    redraw(tmp_path/'record', tmp_path/'drawn')
    assert 'Claims corrected on 2026-11-28: The control was another one.' in (tmp_path/'drawn/claims.md').read_text()
    for recorded in ('run', 'comparisons', 'settings'):
        with pytest.raises(ValueError, match='was recorded and stays as it is'):
            correct_record(tmp_path/'record', '2026-11-28', 'no', **{recorded: 'another'})


@pytest.fixture(scope='module')
def everything():
    "All arms of the recorded run of Mars-PO: two teams, and an arm of one iteration."
    mars, rng, one, two = [a.name for a in MARS_PO.arms][:17], np.random.default_rng(0), dict(borrows=.5, carries=.6, products=.55), {'same-0': .4, 'same-1': .4, 'same-2': .4}
    grow = lambda agents, by: {a: p + by for a, p in agents.items()}
    rows = []
    for arm in mars:
        agents, gain = (two if arm.endswith('_same') else one), rng.uniform(.02, .3)
        rows.append(team(arm, {0: agents} if arm.startswith('base') else {1: grow(agents, gain)} if arm.endswith('one_iteration') else {t: grow(agents, gain*t/3) for t in (1, 2, 3)}, seeds=range(3), problems=40))
    rows = pd.concat(rows, ignore_index=True)
    trained = [a for a in mars if not a.startswith('base')]
    costs = pd.DataFrame([dict(arm=a, seed=s, tokens_sampled=1000, tokens_trained=500, updates=10) for a in trained for s in range(3)])
    log = pd.DataFrame([dict(arm=a, iteration=1 + i//10, step=i, chosen=-1. - i, rejected=-3. - 2*i, margin=.01*i) for a in trained if 'po' in a for i in range(30)])
    rates = pd.DataFrame([dict(arm=a, learning_rate=r, accuracy=p, low=p - .03, high=p + .03, seeds=1, problems=256, run='r') for a in trained for r, p in ((1e-5, .6), (3e-5, .61), (1e-4, .4))])
    chosen = pd.DataFrame([dict(arm=a, seed=s, iteration=1, source_agent=x, candidates=50, selected=20 + s, candidate_tokens=20., selected_tokens=np.nan if x == 'same-0' else 21. + s) for a in trained for s in range(3) for x in (two if a.endswith('_same') else one)])
    return dict(rows=rows, costs=costs, training=log, rates=rates, selection=chosen)


def texts(figure):
    "Every text of a figure that is drawn, with its box."
    FigureCanvasAgg(figure).draw()
    hidden = {id(t) for axes in figure.axes if not axes.get_visible() for t in axes.findobj(Words)}
    return [(t.get_text(), t.get_window_extent()) for t in figure.findobj(Words) if id(t) not in hidden and t.get_visible() and t.get_text().strip() and t.get_window_extent().width > 0]


def apart(figure):
    "No text leaves the figure or covers another."
    with figure_style(): found = texts(figure)
    words = [(t, b) for t, b in found if any(c.isalpha() for c in t) and '$' not in t]
    assert len(words) >= 5
    for i, (one, a) in enumerate(words):
        assert a.x0 >= -1 and a.x1 <= figure.bbox.x1 + 1 and a.y0 >= -1 and a.y1 <= figure.bbox.y1 + 1, one
        for other, b in words[i+1:]: assert a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1, f'{one!r} covers {other!r}'


def test_seventeen_arms_are_drawn_without_overlap(everything):
    rows = everything['rows']
    drawn = figure_arms(rows, figures(MARS_PO, rows))
    shown = [plot_accuracy(rows[rows.arm.isin(drawn[name])]) for name in ('accuracy', 'ablations', 'same')] + [plot_cost(rows, everything['costs']), plot_training(everything['training'], '', drawn['training']), plot_rates(everything['rates'])]
    for figure in shown: apart(figure)


def test_a_record_of_everything_draws_every_figure_twice_the_same(everything, tmp_path):
    comparisons = [['mars_po', 'dpo_nll'], ['mars_po_same', 'base_same']]
    save_record(tmp_path/'record', everything['rows'], everything['costs'], manifest | dict(comparisons=comparisons, claims=[]) | figures(MARS_PO, everything['rows']), training=everything['training'], rates=everything['rates'], selection=everything['selection'])
    names = {f.stem for f in redraw(tmp_path/'record', tmp_path/'one')}
    assert names == {'accuracy', 'ablations', 'same', 'agents', 'training', 'cost', 'rates', 'grid', 'selection', 'results', 'failures', 'comparisons', 'checkpoints'}
    redraw(tmp_path/'record', tmp_path/'two')
    same_files(tmp_path/'one', tmp_path/'two')
    assert 'A seed varies the draw.' in (tmp_path/'one/comparisons.md').read_text()
    table = (tmp_path/'one/results.md').read_text()
    assert 'same-0' in table and '| same-0' in table.replace('· ', '| ') and len(table.splitlines()) == 21


def test_each_team_is_held_against_its_own_base(everything):
    rows = everything['rows']
    lower = rows.assign(c=rows.c.where(~rows.arm.str.endswith('_same'), rows.c*(rows.arm == 'base_same')))
    flags = flag_failures(lower).query("failure == 'agent below its base' and clear")
    assert {*flags.arm} == {'sft_hybrid_same', 'dpo_nll_same', 'mars_po_same'} and {*flags.agent} == {'same-0', 'same-1', 'same-2'}
    figure = plot_accuracy(rows[rows.arm.isin(['base', 'base_same', 'mars_po', 'mars_po_same'])])
    start = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert start['Mars-PO, equal weaknesses'] == start['base, equal weaknesses'] < start['base'] == start['Mars-PO']


def test_bias_of_a_selection_is_named_and_chance_is_not():
    rng, named = np.random.default_rng(3), []
    for run in range(200):
        weights = rng.normal(100, 5, (5, 3, 3))
        table = pd.DataFrame([dict(arm='mars_po', seed=s, iteration=t, source_agent=a, candidates=100., selected=weights[s, t, i], candidate_tokens=20., selected_tokens=20 + rng.normal(0, .5)) for s in range(5) for t in range(3) for i, a in enumerate('abc')])
        named.append(str(flag_selection(table).failure[0]))
    assert .01 < np.mean(['length' in n for n in named]) < .10  # .05, one standard error .015
    assert np.mean(['source agent' in n for n in named]) < .08
    biased = table.assign(selected=table.selected*np.where(table.source_agent == 'b', 1.4, 1), selected_tokens=table.selected_tokens + 3)
    row = flag_selection(biased).iloc[0]
    assert row.failure == 'length, source agent' and row.source_agent == 'b' and abs(row.longer - 3) < .6
    with pytest.raises(ValueError, match='there twice'): flag_selection(pd.concat([table, table]))
    with pytest.raises(ValueError, match="no column 'selected'"): flag_selection(table.drop(columns='selected'))


def test_a_source_that_is_never_chosen_is_no_gap(everything):
    table = everything['selection'].query("arm == 'mars_po_same'")
    none = table.assign(selected=table.selected.where(table.source_agent != 'same-0', 0))
    row = flag_selection(none).iloc[0]
    assert np.isfinite([row.longer, row.favoured]).all() and row.source_agent != 'same-0'


def test_grids_of_unequal_size_are_refused(everything):
    with pytest.raises(ValueError, match='as many learning rates'): choose_rates(everything['rates'][1:])
    chosen = choose_rates(everything['rates'])
    assert {*chosen.learning_rate} == {3e-5} and chosen.edge.isna().all() and {*chosen.ties} == {'1e-5'} and {*chosen.grid} == {3}


def test_rows_that_repeat_never_become_a_record(rows, costs, tmp_path):
    twice = pd.concat([rows, rows[rows.seed == 1].assign(seed=0)])
    with pytest.raises(ValueError, match="there twice .first: arm 'base', seed 0"): save_record(tmp_path, twice, costs, manifest)
    save_record(tmp_path, rows, costs, manifest)
    twice.to_parquet(tmp_path/'results.parquet')
    with pytest.raises(ValueError, match='there twice'): redraw(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_names_have_one_look_each():
    assert len({str(arm_style(a)) for a in arms}) == len({arm_label(a) for a in arms}) == len(arms)
    assert arm_style('never_seen') == arm_style('never_seen')


def test_a_grid_of_rates_alone_is_a_record(tmp_path):
    tried = pd.DataFrame([dict(arm=a, learning_rate=r, accuracy=.5 + r*1000, low=.4, high=.7, seeds=1, problems=50, run='grid-1') for a in ('dpo', 'mars_po') for r in (1e-5, 3e-5, 1e-4)])
    tried.to_csv(tmp_path/'rates.csv', index=False)
    (tmp_path/'manifest.json').write_text('{"run": "grid-1"}')
    assert {p.name for p in redraw(tmp_path, tmp_path/'drawn')} == {'rates.png', 'rates.svg', 'rates.csv', 'rates.md', 'grid.csv', 'grid.md'}
    assert 'grid-1' in (tmp_path/'drawn'/'rates.md').read_text()


def teams(levels, seeds=(0, 1), problems=60):
    "Compact rows of teams that answer together; levels[arm][iteration] is the expected accuracy."
    return pd.concat([team(arm, {t: dict(team=p) for t, p in line.items()}, seeds, problems, greedy=False) for arm, line in levels.items()], ignore_index=True)


@pytest.fixture(scope='module')
def debates():
    "Every arm of Multiagent Finetuning, with what was measured beside accuracy."
    rng = np.random.default_rng(0)
    untrained = ['base', 'majority', 'debate', 'unique_ids', 'cooperative', 'debate_five']
    trained = [arm.name for arm in MULTIAGENT_FT.arms if arm.trained]
    assert len(trained) == 16
    rows = teams({a: {0: .5 + .01*i} for i, a in enumerate(untrained)} | {a: {t: .6 + .01*t for t in ((1,) if '_five' in a or 'dpo' in a else (1, 2, 3))} for a in trained})
    last = rows.groupby('arm').iteration.max()
    diversity = pd.DataFrame([dict(arm=a, seed=s, iteration=t, measure=m, round=r, mean=v + .02*rng.normal(), low=v - .1, high=v + .1, se=.02, problems=60)
                              for a in last.index for t in (range(1, last[a] + 1) if last[a] else [0]) for s in (0, 1) for m, r, v in (('consensus', 0, .6), ('consensus', 1, .8), ('dissimilarity', 1, .4), ('nll', 1, .5), ('kl', 1, .2), ('kl_to_base', 1, .3))])
    readouts = pd.DataFrame([dict(arm=a, iteration=t, readout=way, accuracy=.5 + .1*k, low=.45 + .1*k, high=.55 + .1*k, seeds=2, problems=60) for a, t in last.items() for k, way in enumerate(('alone', 'debate', 'vote'))])
    return dict(rows=rows, diversity=diversity, readouts=readouts)


@pytest.fixture(scope='module')
def trees():
    "Every arm of MALT, with what was measured beside accuracy."
    levels = {a: {0: .5} for a in ('sa', 'sa_vote', 'sa_vote_nine', 'ma', 'ma_vote', 'ma_shuffled', 'debate')} | {arm.name: {1: .6} for arm in MALT.arms if arm.trained and arm.label}
    flips = pd.DataFrame([dict(arm=a, iteration=max(t), flip=f, share=v, low=v - .02, high=v + .02) for a, t in levels.items() for f, v in (('wrong to right', .1), ('right to right', .5), ('wrong to wrong', .37), ('right to wrong', .03))])
    readouts = pd.DataFrame([dict(arm=a, iteration=max(t), readout=way, accuracy=.5 + .04*k, low=.45 + .04*k, high=.55 + .04*k, seeds=2, problems=60) for a, t in levels.items() for k, way in enumerate(('vote', 'after verifier', 'after refiner', 'after generator'))])
    sweep = pd.DataFrame([dict(setting=n, value=v, arm=a, accuracy=.6, low=.55, high=.65) for a in ('malt', 'malt_one', 'star_ma') for n, values in (('branching', (2, 3, 4, 5)), ('threshold', (.3, .5, .7)), ('votes', (1, 3, 9))) for v in values])
    return dict(rows=teams(levels), flips=flips, readouts=readouts, sweep=sweep)


def test_a_debate_begins_where_it_was_untrained(debates):
    rows, begin = debates['rows'], dict(bases=dict(multiagent_ft='debate', single_agent='debate'))
    base = base_arms(rows, begin)
    assert base['multiagent_ft'] == 'debate' and base['star'] == base['debate'] == base['base'] == 'base'
    drawn = figure_arms(rows, begin | figures(MULTIAGENT_FT, rows))
    assert [*drawn] == ['accuracy', 'ablations', 'seats', 'preferences', 'readouts', 'diversity']
    axes = plot_accuracy(rows[rows.arm.isin(drawn['accuracy'])], base=base).axes[0]
    start = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert start['Multiagent FT'] == start['debate'] != start['STaR'] == start['base']
    assert axes.get_ylabel() == 'team accuracy' and axes.get_xticklabels()[0].get_text() == 'untrained'
    labels = [t.get_text() for t in axes.texts]
    assert any(t.startswith('debate  ') for t in labels) and any(t.startswith('base  ') for t in labels)
    with pytest.raises(ValueError, match="bases name arm 'nobody'"): base_arms(rows, dict(bases=dict(star='nobody')))


def test_an_arm_measured_late_has_no_line_to_the_start():
    rows = teams(dict(debate={0: .5}, multiagent_ft={1: .6, 2: .7, 3: .8}, multiagent_ft_no_interaction={3: .6}))
    figure = plot_accuracy(rows, base=base_arms(rows))
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_label() == 'Multiagent FT, no interaction'] == [1]
    assert figure.axes[0].get_xticklabels()[0].get_text() == 'debate'


def test_a_team_has_one_column_and_no_figure_of_agents(debates, trees):
    for rows in (debates['rows'], trees['rows']):
        table = results_table(rows)
        assert [*table.columns] == ['arm', 'iteration', 'team', 'team_low', 'team_high', 'seeds'] and 'agents' not in figure_arms(rows, {})
    mixed = results_table(pd.concat([team('base', {0: dict(a=.5, b=.5)}), teams(dict(debate={0: .6}))]))
    assert 'other_agents' not in mixed and mixed.columns.is_unique


def test_a_team_below_its_base_is_named(trees):
    rows = trees['rows']
    worse = rows.assign(c=rows.c.where(rows.arm != 'malt', 0))
    flags = flag_failures(worse)
    assert flags.query("arm == 'malt' and failure == 'below its base' and agent == 'team'").clear.all() and 'malt' in set(flags.arm) and 'sa' not in set(flags.arm)
    assert base_arms(rows) == dict.fromkeys(rows.arm, 'sa')


def test_figures_of_debates_and_trees_are_drawn_without_overlap(debates, trees):
    rows = debates['rows']
    begin, drawn = base_arms(rows), figure_arms(rows, figures(MULTIAGENT_FT, rows))
    shown = [plot_accuracy(rows[rows.arm.isin(drawn[name])]) for name in ('accuracy', 'ablations', 'seats', 'preferences')]
    shown += [plot_diversity(debates['diversity'], 'run', drawn['diversity'], begin), plot_readouts(debates['readouts'], 'run')]
    shown += [plot_diversity(debates['diversity'].query(f"measure == '{m}'"), 'run', drawn['diversity']) for m in ('consensus', 'kl')]
    shown += [plot_arms(trees['rows'], run='run'), plot_readouts(trees['readouts'], 'run'), plot_flips(trees['flips'], 'run'), plot_sweep(trees['sweep'], 'run'), plot_sweep(trees['sweep'].query("setting == 'votes'"))]
    for figure in shown: apart(figure)


def test_records_of_debates_and_trees_draw_the_same_bytes_twice(debates, trees, costs, tmp_path):
    own = {k: v for k, v in manifest.items() if k not in ('claims', 'comparisons')}
    save_record(tmp_path/'debates', debates['rows'], costs[:0], own | dict(bases=dict(multiagent_ft='debate')) | figures(MULTIAGENT_FT, debates['rows']), diversity=debates['diversity'], readouts=debates['readouts'])
    save_record(tmp_path/'trees', trees['rows'], costs[:0], own | figures(MALT, trees['rows']), readouts=trees['readouts'], flips=trees['flips'], sweep=trees['sweep'])
    drawn = {}
    for name in ('debates', 'trees'):
        drawn[name] = {f.name for f in redraw(tmp_path/name, tmp_path/'one'/name) if f.suffix in ('.png', '.md')}
        redraw(tmp_path/name, tmp_path/'two'/name)
        same_files(tmp_path/'one'/name, tmp_path/'two'/name)
    tables = {'results.md', 'accuracy.md', 'failures.md'}
    assert drawn['debates'] == tables | {f'{n}.png' for n in ('accuracy', 'ablations', 'seats', 'preferences', 'diversity', 'readouts')} | {'diversity.md', 'readouts.md'}
    assert drawn['trees'] == tables | {f'{n}.{e}' for n in ('readouts', 'flips', 'sweep') for e in ('png', 'md')} | {f'{n}.png' for n in ('accuracy', 'ablations', 'equal_calls', 'critiques')}
    for file in (tmp_path/'one').rglob('*'):
        if file.suffix in ('.md', '.svg', '.png'): assert b'0a1b2c3d' in file.read_bytes(), file.name


def test_an_empty_table_of_a_record_is_passed_over(debates, costs, tmp_path):
    save_record(tmp_path/'record', debates['rows'], costs[:0], {k: v for k, v in manifest.items() if k not in ('claims', 'comparisons')}, diversity=debates['diversity'][:0], readouts=debates['readouts'][:0])
    assert not {f.stem for f in redraw(tmp_path/'record', tmp_path/'drawn')} & {'diversity', 'readouts'}


further = dict(diversity=(plot_diversity, diversity_table), readouts=(plot_readouts, readouts_table), flips=(plot_flips, flips_table), sweep=(plot_sweep, sweep_table))
used = dict(diversity=['arm', 'seed', 'iteration', 'measure', 'round', 'mean', 'low', 'high', 'se', 'problems'], readouts=['arm', 'iteration', 'readout', 'accuracy', 'low', 'high'],
            flips=['arm', 'iteration', 'flip', 'share', 'low', 'high'], sweep=['setting', 'value', 'arm', 'accuracy', 'low', 'high'])


@pytest.mark.parametrize('name', further)
def test_a_table_that_is_not_right_is_one_sentence(name, debates, trees):
    table = (debates | trees)[name]
    for show in further[name]:
        for column in used[name]:
            with pytest.raises(ValueError, match=f"the {name} table has no column '{column}'; it needs"): show(table.drop(columns=column))
        with pytest.raises(ValueError, match=f'the {name} table has no rows'): show(table[:0])
        with pytest.raises(ValueError, match=f'rows of the {name} table are there twice'): show(pd.concat([table, table[:1]]))


def test_names_are_drawn_as_they_are(debates, trees):
    "No name in a record is read as a formula or acts on what is around it."
    def named(table, column):
        names = list(dict.fromkeys(table[column]))[:len(hostile)]
        return table.assign(**{column: table[column].replace(dict(zip(names, hostile)))})
    rows, diversity = named(trees['rows'], 'arm'), debates['diversity']
    figures = [plot_arms(rows), plot_accuracy(rows), plot_diversity(named(diversity, 'arm'), shown=hostile), plot_diversity(named(diversity, 'measure')), plot_readouts(named(trees['readouts'], 'readout')),
               plot_flips(named(trees['flips'], 'arm')), plot_sweep(named(trees['sweep'], 'setting'), hostile[4])]
    for figure in figures:
        with figure_style(): words = [t for t in figure.findobj(Words) if t.get_text()]
        for one in words: assert not {*'\x1b\x00\u202e'} & {*one.get_text()} and re.sub(r'\\\$', '', one.get_text()).count('$') in (0, 1)
        with figure_style(): FigureCanvasAgg(figure).draw()
    assert any('x^2' in t.get_text() for t in figures[0].findobj(Words))


def test_one_seed_keeps_its_interval_and_several_widen_it(debates):
    table = debates['diversity']
    keys = ['arm', 'iteration', 'round', 'measure']
    one = average_diversity(table[table.seed == 0]).set_index(keys)
    assert (one[['low', 'high']] == table[table.seed == 0].set_index(keys)[['low', 'high']].reindex(one.index)).all(axis=None) and {*one.seeds} == {1}
    rng = np.random.default_rng(0)
    truth, covered = .5, []
    for _ in range(400):  # 5 seeds, 200 problems: the mean over seeds of a measure whose seeds differ
        problems, seeds = rng.normal(truth, .3, 200), rng.normal(0, .02, 5)
        values = problems + seeds[:, None] + rng.normal(0, .1, (5, 200))
        run = pd.DataFrame([dict(arm='a', seed=s, iteration=1, measure='nll', round=1, mean=v.mean(), low=0, high=1, se=v.std(ddof=1)/200**.5, problems=200) for s, v in enumerate(values)])
        row = average_diversity(run).iloc[0]
        covered.append(row.low <= truth <= row.high)
    assert .93 < np.mean(covered) < 1
    wide = average_diversity(pd.DataFrame([dict(arm='a', seed=s, iteration=0, measure='consensus', round=0, mean=.98, low=.9, high=1, se=.05, problems=60) for s in (0, 1)])).iloc[0]
    assert wide.high == 1 and wide.low < .9


def test_readouts_and_flips_stand_in_their_order(debates, trees):
    assert [*readouts_table(debates['readouts']).columns[[2, 5, 8]]] == ['alone', 'vote', 'debate']
    assert [*readouts_table(trees['readouts']).columns[[2, 5, 8, 11]]] == ['after generator', 'after verifier', 'after refiner', 'vote']
    assert [*flips_table(trees['flips']).arm[:4]] == ['sa', 'sa_vote', 'sa_vote_nine', 'ma']
    lost = trees['flips'][trees['flips'].flip != 'right to wrong'].assign(share=lambda t: t.share.where(t.flip != 'wrong to wrong', .4))
    bars = plot_flips(lost).axes[0].patches
    assert np.isclose(sum(b.get_width() for b in bars), lost.arm.nunique())


def test_swept_words_stand_side_by_side(trees):
    words = pd.DataFrame([dict(setting='order', value=v, arm='malt', accuracy=.6, low=.5, high=.7) for v in ('a', 'b', 'c')])
    both = pd.concat([words, trees['sweep'].query("setting == 'threshold'").astype(dict(value=str))])
    first, second = plot_sweep(both).axes
    assert [t.get_text() for t in first.get_xticklabels()] == ['a', 'b', 'c'] and [*second.get_xticks()] == [.3, .5, .7]
    assert [*sweep_table(both).value] == ['a', 'b', 'c'] + ['0.3']*3 + ['0.5']*3 + ['0.7']*3 and [*sweep_table(both).arm[3:6]] == ['star_ma', 'malt_one', 'malt']


def test_a_team_trained_once_has_rows_whatever_its_bases(trees, costs, tmp_path):
    "Lines from nowhere to iteration 1 would say nothing; an arm that is its own base is no other case."
    bases = {a: a for a in ('sa', 'ma')} | dict(malt='ma_vote')
    save_record(tmp_path/'record', trees['rows'], costs[:0], {k: v for k, v in manifest.items() if k not in ('claims', 'comparisons')} | dict(bases=bases) | figures(MALT, trees['rows']))
    svg = {f.stem: f for f in redraw(tmp_path/'record', tmp_path/'drawn') if f.suffix == '.svg'}
    with figure_style(): rows = plot_arms(trees['rows'][trees['rows'].arm.isin(figure_arms(trees['rows'], dict(bases=bases) | figures(MALT, trees['rows']))['accuracy'])], run=manifest['run'])
    assert svg['accuracy'].read_bytes() == rows._bytes('svg', 200)
