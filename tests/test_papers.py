"Every paper notebook runs through papermill, at a size of seconds."
import json

import pytest

import test_malt
import test_mars_po
import test_multiagent_ft
from conftest import REPO, command
from mapo.cli import parameters, settable

PAPERS = sorted((REPO/'nbs'/'papers').glob('*.ipynb'))

# The parameters that make each paper notebook a matter of seconds; nothing else differs from a real run. The three
# papers are run as their own tests run them, in the same run root: whichever comes second finds the stages finished.
# The grids are not, so kernels compute stages, too.
SMOKE = {
    'malt': {'preset': 'smoke', 'arms': test_malt.KINDS, **test_malt.SMALL},
    'malt_rates': {'preset': 'smoke', 'arms': 'malt_one', 'rates': [1e-4], 'overrides': test_malt.SMALL},
    'mars_po': {'preset': 'smoke', 'arms': 'all', **test_mars_po.ONCE},
    'mars_po_rates': {'preset': 'smoke', 'arms': 'mars_po', 'rates': [1e-4], 'overrides': test_mars_po.SMALL},
    'multiagent_ft': {'preset': 'smoke', **test_multiagent_ft.SMALL, 'transfer': 'arithmetic'},
    'multiagent_ft_rates': {'preset': 'smoke', 'arms': 'majority_ft', 'rates': [1e-4],
                            'overrides': test_multiagent_ft.SMALL},
    'small_agents': {'model': 'tiny:products', 'template': '', 'question': '{expression}', 'dtype': 'float32',
                     'n_lessons': 32, 'updates': 2, 'n_samples': 2},
    'tiny_world': {'trial': 'new', 'n': 20},
}


@pytest.mark.parametrize('path', [pytest.param(p, marks=pytest.mark.xdist_group(p.stem.removesuffix('_rates')))
                                  for p in PAPERS], ids=lambda p: p.stem)
def test_paper_notebook_runs(path, tmp_path):
    assert path.stem in SMOKE, f'tests/test_papers.py has no small size for {path.name}: add one to SMOKE'
    known = {**parameters(path), **settable(path.stem)} # settings by their own names, as `papermill -p` gives them
    # papermill only warns
    assert set(SMOKE[path.stem]) <= set(known), f'{path.name} has no parameter {set(SMOKE[path.stem]) - set(known)}'
    given = ['-y', json.dumps(SMOKE[path.stem])] # one of JSON's numbers, lists and texts is YAML's too
    code, output = command('papermill', path, tmp_path/'out.ipynb', '-k', 'python3', '--no-progress-bar', *given,
                           cwd=tmp_path, timeout=300)
    assert code == 0, output[-6000:]
