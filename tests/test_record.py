"""A record draws its figures and tables again, the same bytes in every process, and keeps what it held."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mapo.figures import plot_arms
from mapo.malt import MALT
from mapo.mars_po import MARS_PO
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.record import (_drawn, claims_note, compare_to_record, correct_record, figure_arms, load_record, redraw,
                         save_record)
from written import costs, debates, everything, figures, manifest, record, rows, trees  # noqa: F401 fixtures among them


@pytest.fixture(scope='module')
def drawn(record, tmp_path_factory):
    "What the record of three arms draws: (folder, files)."
    folder = tmp_path_factory.mktemp('drawn')
    return folder, redraw(record, folder)


def same_files(one, two):
    names = sorted(p.name for p in Path(one).iterdir())
    assert names == sorted(p.name for p in Path(two).iterdir()) and len(names) >= 14
    for name in names: assert (Path(one)/name).read_bytes() == (Path(two)/name).read_bytes(), name


def test_redraw_gives_the_same_bytes_whatever_the_settings_and_process(record, drawn, tmp_path):
    odd = {'font.size': 20, 'axes.facecolor': 'red', 'svg.hashsalt': 'other', 'savefig.dpi': 30, 'lines.linewidth': 9}
    code = ('import sys, matplotlib; from mapo.record import redraw\n'
            f'with matplotlib.rc_context({odd!r}): redraw({str(record)!r}, {str(tmp_path/"again")!r})\nassert "torch" '
            f'not in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True,
                   env={**os.environ, 'PYTHONHASHSEED': '7', 'TZ': 'Asia/Tokyo'}, cwd=tmp_path)
    same_files(drawn[0], tmp_path/'again')


def test_record_bytes_do_not_depend_on_row_order(rows, costs, record, tmp_path):
    save_record(tmp_path, rows.sample(frac=1, random_state=0), costs.iloc[::-1], manifest)
    for file in record.iterdir(): assert file.read_bytes() == (tmp_path/file.name).read_bytes(), file.name


def test_every_file_names_the_run_and_none_a_date(drawn):
    for file in drawn[1]:
        data = file.read_bytes()
        if file.suffix != '.csv': assert b'0a1b2c3d' in data, file.name
        assert b'Matplotlib v' not in data and b'<dc:date>' not in data and b'Software' not in data


def test_record_missing_a_file_is_one_sentence(record, tmp_path):
    (tmp_path/'results.parquet').write_bytes((record/'results.parquet').read_bytes())
    with pytest.raises(FileNotFoundError, match='budget.csv, manifest.json'): load_record(tmp_path)


def test_a_repeated_run_agrees_with_itself_and_not_with_a_worse_one(rows):
    assert compare_to_record(rows, rows).agrees.all()
    worse = compare_to_record(rows.assign(c=rows.c.where(rows.arm != 'mars_po', rows.c // 2)), rows)
    assert not worse[worse.arm == 'mars_po'].agrees.any() and worse[worse.arm != 'mars_po'].agrees.all()
    assert compare_to_record(rows[rows.seed == 0], rows).agrees.all()


def test_a_corrected_record_keeps_its_results_and_says_what_was_wrong(record, tmp_path):
    shutil.copytree(record, tmp_path/'record')
    claims = [manifest['claims'][0] | dict(claim='better than its base', tests=[['mars_po', 'base']])]
    correct_record(tmp_path/'record', '2026-11-28', 'The control was another one.', claims=claims)
    changed = [p.name for p in sorted(record.iterdir()) if p.read_bytes() != (tmp_path/'record'/p.name).read_bytes()]
    assert changed == ['manifest.json']
    assert 'Claims corrected on 2026-11-28: The control was another one.' in claims_note(
        correct_record(tmp_path/'record', '2026-11-29', 'again', claims=claims))
    for recorded in ('run', 'comparisons', 'settings'):
        with pytest.raises(ValueError, match='was recorded and stays as it is'):
            correct_record(tmp_path/'record', '2026-11-28', 'no', **{recorded: 'another'})


def test_a_record_of_everything_draws_every_figure(everything, tmp_path):
    comparisons = [['mars_po', 'dpo_nll'], ['mars_po_same', 'base_same']]
    save_record(tmp_path/'record', everything['rows'], everything['costs'],
                manifest | dict(comparisons=comparisons, claims=[]) | figures(MARS_PO, everything['rows']),
                training=everything['training'], rates=everything['rates'], selection=everything['selection'])
    names = {f.stem for f in redraw(tmp_path/'record', tmp_path/'one')}
    assert names == {'accuracy', 'ablations', 'same', 'agents', 'training', 'cost', 'rates', 'grid', 'selection',
                     'results', 'failures', 'comparisons', 'checkpoints'}
    assert 'A seed varies the draw.' in (tmp_path/'one/comparisons.md').read_text()
    table = (tmp_path/'one/results.md').read_text()
    assert 'same-0' in table and '| same-0' in table.replace('· ', '| ')
    assert len(table.splitlines()) == 4 + everything['rows'].arm.nunique()


def test_rows_that_repeat_never_become_a_record(rows, costs, tmp_path):
    twice = pd.concat([rows, rows[rows.seed == 1].assign(seed=0)])
    with pytest.raises(ValueError, match="there twice .first: arm 'base', seed 0"):
        save_record(tmp_path, twice, costs, manifest)
    save_record(tmp_path, rows, costs, manifest)
    twice.to_parquet(tmp_path/'results.parquet')
    with pytest.raises(ValueError, match='there twice'): redraw(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_grid_of_rates_alone_is_a_record(tmp_path):
    tried = pd.DataFrame([dict(arm=a, learning_rate=r, accuracy=.5 + r*1000, low=.4, high=.7, seeds=1, problems=50,
                               run='grid-1') for a in ('dpo', 'mars_po') for r in (1e-5, 3e-5, 1e-4)])
    tried.to_csv(tmp_path/'rates.csv', index=False)
    (tmp_path/'manifest.json').write_text('{"run": "grid-1"}')
    assert {p.name for p in redraw(tmp_path, tmp_path/'drawn')} == {
        'rates.png', 'rates.svg', 'rates.csv', 'rates.md', 'grid.csv', 'grid.md'}
    assert 'grid-1' in (tmp_path/'drawn'/'rates.md').read_text()


def test_a_team_has_no_figure_of_agents(debates, trees):
    for rows in (debates['rows'], trees['rows']): assert 'agents' not in figure_arms(rows, {})


def test_records_of_debates_and_trees_draw_what_they_hold(debates, trees, costs, tmp_path):
    own = {k: v for k, v in manifest.items() if k not in ('claims', 'comparisons')}
    save_record(tmp_path/'debates', debates['rows'], costs[:0],
                own | dict(bases=dict(multiagent_ft='debate')) | figures(MULTIAGENT_FT, debates['rows']),
                diversity=debates['diversity'], readouts=debates['readouts'])
    save_record(tmp_path/'trees', trees['rows'], costs[:0], own | figures(MALT, trees['rows']),
                readouts=trees['readouts'], flips=trees['flips'], sweep=trees['sweep'])
    drawn = {}
    for name in ('debates', 'trees'):
        drawn[name] = {f.name for f in redraw(tmp_path/name, tmp_path/'one'/name) if f.suffix in ('.png', '.md')}
    tables = {'results.md', 'accuracy.md', 'failures.md'}
    groups = ('accuracy', 'ablations', 'seats', 'preferences', 'controls', 'lessons', 'diversity', 'readouts')
    assert drawn['debates'] == tables | {f'{n}.png' for n in groups} | {'diversity.md', 'readouts.md'}
    assert drawn['trees'] == tables | {f'{n}.{e}' for n in ('readouts', 'flips', 'sweep') for e in ('png', 'md')} | {
        f'{n}.png' for n in ('accuracy', 'ablations', 'equal_calls', 'critiques')}
    for file in (tmp_path/'one').rglob('*'):
        if file.suffix in ('.md', '.svg', '.png'): assert b'0a1b2c3d' in file.read_bytes(), file.name


def test_an_empty_table_of_a_record_is_passed_over(debates, costs, tmp_path):
    save_record(tmp_path/'record', debates['rows'], costs[:0],
                {k: v for k, v in manifest.items() if k not in ('claims', 'comparisons')},
                diversity=debates['diversity'][:0], readouts=debates['readouts'][:0])
    assert not {f.stem for f in redraw(tmp_path/'record', tmp_path/'drawn')} & {'diversity', 'readouts'}


def test_a_team_trained_once_has_rows_whatever_its_bases(trees, costs, tmp_path):
    "Lines from nowhere to iteration 1 would say nothing; an arm that is its own base is no other case."
    about = manifest | dict(bases={a: a for a in ('sa', 'ma')} | dict(malt='ma_vote'), claims=[],
                            comparisons=[]) | figures(MALT, trees['rows'])
    save_record(tmp_path, trees['rows'], costs[:0], about)
    drawn = next(figure for name, figure, *_ in _drawn(tmp_path) if name == 'accuracy')
    shown = trees['rows'][trees['rows'].arm.isin(figure_arms(trees['rows'], about)['accuracy'])]
    assert drawn._bytes('svg', 200) == plot_arms(shown, run=manifest['run'])._bytes('svg', 200)
