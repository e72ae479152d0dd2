"Two workers share the groups of tests, and no group is torn apart: what its tests share would be made twice."
import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import command

TESTS = """
import time

import pytest


@pytest.mark.parametrize('i', range(4))
def test_of_its_file(i): time.sleep(.1)


@pytest.mark.xdist_group('both')
def test_of_a_group_of_several_files(): time.sleep(.1)
"""


def test_a_group_is_one_workers(tmp_path):
    pytest.importorskip('xdist')
    (tmp_path/'tests').mkdir()
    shutil.copy(Path(__file__).with_name('conftest.py'), tmp_path/'tests')
    shutil.copy(Path(__file__).with_name('warm.py'), tmp_path/'tests')
    for name in ('one', 'two', 'three'): (tmp_path/'tests'/f'test_{name}.py').write_text(TESTS)
    code, said = command(sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', '-n', '2', '--dist',
                         'loadgroup', '--no-loadscope-reorder', cwd=tmp_path, PYTEST_XDIST_WORKER='')
    assert code == 0, said
    took = {}
    for worker, file, test in re.findall(r'\[(gw\d)\] .* PASSED tests/test_(\w+)\.py::(\w+)', said):
        took.setdefault('both' if 'group' in test else file, []).append(worker)
    assert {group: len(workers) for group, workers in took.items()} == dict(one=4, two=4, three=4, both=3)
    assert all(len({*workers}) == 1
               for workers in took.values()) and len({w for workers in took.values() for w in workers}) == 2, took
