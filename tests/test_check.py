"`make check` runs what a change touches, and what it names is there."
import re

import pytest

import check
from conftest import REPO, tracked
from test_figures import PAPERS, RECORDS
from test_notebooks import NOTEBOOKS

KNOWN = check.modules()
NAMES = {'test_figures_are_what_the_record_draws': RECORDS, 'test_a_paper_shows_its_record': PAPERS,
         'test_notebook_runs': [p.stem for p in NOTEBOOKS if p.parent.name != 'papers'],
         'test_paper_notebook_runs': [p.stem for p in NOTEBOOKS if p.parent.name == 'papers']}


def test_what_is_chosen_for_any_file_is_there():
    for path in tracked():
        for test in check.chosen(path.as_posix(), KNOWN):
            file, name, which = re.fullmatch(r'([\w/.]+)(?:::(\w+)\[(.+)\])?', test).groups()
            assert (REPO/file).exists() and (not name or which in NAMES[name]), f'{path}: {test}'


@pytest.mark.parametrize('path,tests', {
    'mapo/pairs.py': ['test_notebooks.py::test_notebook_runs[07_pairs]', 'test_pairs.py'],
    'nbs/api/07_pairs.ipynb': ['test_notebooks.py::test_notebook_runs[07_pairs]', 'test_pairs.py'],
    'mapo/launch/fsdp.yaml': ['test_notebooks.py::test_notebook_runs[09_training]', 'test_training.py',
                              'test_launch.py'],
    'tests/test_runs.py': ['test_runs.py'],
    'nbs/papers/malt.ipynb': ['test_papers.py::test_paper_notebook_runs[malt]',
                              'test_figures.py::test_a_paper_shows_its_record[malt]'],
    'nbs/papers/tiny_world.ipynb': ['test_papers.py::test_paper_notebook_runs[tiny_world]'],
    'figures/record/malt/flips.csv': ['test_figures.py::test_figures_are_what_the_record_draws[malt]',
                                      'test_figures.py::test_a_paper_shows_its_record[malt]'],
    'nbs/tutorials/specialization.ipynb': ['test_notebooks.py::test_notebook_runs[specialization]'],
    'nbs/servers/array.sbatch': ['test_servers.py'],
    'mapo/_modidx.py': [],
    'README.md': []}.items())
def test_a_change_is_checked_by_what_it_touches(path, tests):
    assert check.chosen(path, KNOWN) == [f'tests/{t}' for t in tests]


def test_a_module_without_tests_of_its_own_is_checked_by_those_that_import_it():
    assert not (REPO/'tests'/'test_agents.py').exists()
    assert 'test_engines.py' in [p.name for p in check.tests_of('agents')]
    assert [p.name for p in check.tests_of('pairs')] == ['test_pairs.py']


def test_a_revision_that_is_none_is_named():
    with pytest.raises(SystemExit, match="git knows neither 'nonsense' nor origin/nonsense"): check.changed('nonsense')
