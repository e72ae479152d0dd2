"`make figures`: every figure, table and paper notebook comes out of the committed record exactly as it is committed."
import json

import pytest

from conftest import REPO
from mapo import cli
from mapo.cli import main, notebooks
from warm import Warm

RECORDS = sorted(p.parent.name for p in (REPO/'figures'/'record').glob('*/manifest.json'))
PAPERS = [name for name in RECORDS if name in notebooks()]

DRAW = '''
import sys
from pathlib import Path
from mapo.report import redraw
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
    assert drawn.keys() == shown.keys() and not [n for n in shown if shown[n] != drawn[n]], f'figures/{name} is not what its record draws; run `make figures`'


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.xdist_group(f'notebook of {n}')) for n in PAPERS])
def test_a_paper_shows_its_record(name, copy):
    path = copy/'nbs'/'papers'/f'{name}.ipynb'
    before = path.read_text()
    path.write_text(json.dumps(emptied(before)))
    run(SHOW, name, copy)
    assert path.read_text() == before, f'nbs/papers/{name}.ipynb does not show what its record draws; run `make figures`'
    said = json.dumps([c.get('outputs') for c in json.loads(before)['cells']])
    assert json.loads((copy/'figures'/'record'/name/'manifest.json').read_text())['run'] in said, f'nbs/papers/{name}.ipynb does not show the run of its record'


def emptied(text):
    notebook = json.loads(text)
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    return notebook


def test_the_command_draws_every_record_and_every_paper(monkeypatch, capsys):
    "Each by the functions that are tested above."
    drawn, shown = [], []
    monkeypatch.setattr('mapo.report.redraw', lambda record, folder: drawn.append((record, folder)))
    monkeypatch.setattr(cli, 'draw_notebook', shown.append)
    main(['figures'])
    figures = REPO/'figures'
    assert drawn == [(figures/'record'/name, figures/name) for name in RECORDS] and shown == PAPERS
    assert len(capsys.readouterr().out.splitlines()) == len(RECORDS) > 0
