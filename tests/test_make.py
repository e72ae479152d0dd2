"make installs once, again only when what is to be installed changes, and says so where Python is too old."
import os
import shutil

import pytest

from conftest import command

pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='there is no make on this machine')


@pytest.fixture
def installed(copy):
    "A copy that looks as if `make` had installed it."
    (copy/'.venv').mkdir()
    (copy/'.venv'/'ready').touch()
    for path in ('pyproject.toml', 'constraints.txt'): os.utime(copy/path, (1e9, 1e9))
    return copy


@pytest.mark.parametrize('target', ['reproduce', 'check', 'test', 'lab', 'docs', 'bench', 'figures'])
def test_targets_install_only_when_needed(installed, target):
    code, planned = command('make', '-n', target, cwd=installed)
    assert code == 0 and 'pip install' not in planned, planned
    os.utime(installed/'constraints.txt')
    assert 'pip install' in command('make', '-n', target, cwd=installed)[1]


def test_an_old_python_is_refused_in_one_sentence(copy):
    code, output = command('make', 'PYTHON=', 'test', cwd=copy)
    assert code != 0 and 'mapo needs Python 3.11.5 or newer' in output
    assert not (copy/'.venv').exists()
