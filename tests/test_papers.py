"Every paper notebook runs through papermill, at a size of seconds."
import json

import papermill
import pytest

from conftest import REPO, command

PAPERS = sorted((REPO/'nbs'/'papers').glob('*.ipynb'))

# the parameters that make each paper notebook a matter of seconds; nothing else differs from a real run
SMOKE = {
    'malt': {'preset': 'smoke'},
    'malt_rates': {'preset': 'smoke', 'arms': 'malt_one', 'rates': [1e-4]},
    'mars_po': {'preset': 'smoke'},
    'mars_po_rates': {'preset': 'smoke', 'arms': 'mars_po', 'rates': [1e-4]},
    'multiagent_ft': {'preset': 'smoke'},
    'multiagent_ft_rates': {'preset': 'smoke', 'arms': 'majority_ft', 'rates': [1e-4]},
    'small_agents': {'model': 'tiny:products', 'template': '', 'question': '{expression}', 'dtype': 'float32',
                     'n_lessons': 32, 'updates': 2, 'n_samples': 2},
    'tiny_world': {'trial': 'new', 'n': 20},
}


@pytest.mark.parametrize('path', PAPERS, ids=lambda p: p.stem)
def test_paper_notebook_runs(path, tmp_path):
    assert path.stem in SMOKE, f'tests/test_papers.py has no small size for {path.name}: add one to SMOKE'
    known = papermill.inspect_notebook(str(path))
    assert set(SMOKE[path.stem]) <= set(known), f'{path.name} has no parameter {set(SMOKE[path.stem]) - set(known)}' # papermill only warns
    parameters = ['-y', json.dumps(SMOKE[path.stem])] # one of JSON's numbers, lists and texts is YAML's too
    code, output = command('papermill', path, tmp_path/'out.ipynb', '-k', 'python3', '--no-progress-bar', *parameters,
                           cwd=tmp_path, timeout=300, MAPO_RUNS=str(tmp_path/'runs'))
    assert code == 0, output[-6000:]
