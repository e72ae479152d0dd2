"Every API and tutorial notebook runs from top to bottom, and leaves nothing behind."
from pathlib import Path

import pytest

from conftest import REPO, tracked
from warm import Warm

# what `nbdev_test` does with one notebook; cells that are marked `eval: false` and notebooks that say `skip_exec`
# (papermill runs those) are passed over
RUN = '''
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
passed,_ = test_nb(Path(sys.argv[1]).resolve(), skip_flags=get_config().tst_flags.split(),
                   basepath=get_config().config_path)
sys.exit(not passed)
'''
NOTEBOOKS = sorted(p for p in tracked() if p.suffix == '.ipynb' and p.parts[0] == 'nbs')
SECONDS = 300 # for one


def files(folder): return {p for p in folder.rglob('*') if '__pycache__' not in p.parts}


@pytest.mark.parametrize('path', [pytest.param(p, marks=pytest.mark.xdist_group(p.stem)) for p in NOTEBOOKS
                                  if p.parent.name != 'papers'], ids=lambda p: p.stem)
def test_notebook_runs(path, checkout, tmp_path):
    before = files(checkout)
    code, said = Warm(RUN, path, said=tmp_path/'said', cwd=checkout, PYTHONPATH=checkout).wait(SECONDS)
    assert code == 0, said[-8000:]
    left = {str(p.relative_to(checkout)) for p in files(checkout) - before}
    assert not left, f'{path} leaves {", ".join(sorted(left))} behind'


def test_nbdev_test_finds_the_same_notebooks():
    "What is tested here is what the command would run: it passes over nothing else, and looks wherever notebooks are."
    from nbdev.doclinks import nbglob
    assert {Path(p).resolve().relative_to(REPO) for p in nbglob(REPO/'nbs')} == {*NOTEBOOKS}
