"A wheel in an empty folder can run a tiny agent and the command line."
import sys

import pytest

from conftest import command
from warm import Warm

AGENT = '''
import mapo
from pathlib import Path
from mapo.agents import CHECKPOINTS, Model
from mapo.engines import Request, Sampling, TransformersEngine
assert Path(mapo.__file__).is_relative_to(HERE), mapo.__file__
name = sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir())[0]
engine = TransformersEngine(Model(name, f'tiny:{name}'), device='cpu')
[[answer]] = engine.generate([Request(({'role': 'user', 'content': '2*3+4*5-6'},), seed=0)], Sampling(max_tokens=64))
print(f'{name}: {answer.text}')
'''


@pytest.fixture
def installed(copy, tmp_path):
    "The wheel, built from a copy and unpacked into an empty folder; its dependencies stay in this environment."
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    code, output = command(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path/'dist',
                           copy, cwd=tmp_path)
    assert code == 0, output
    [wheel] = (tmp_path/'dist').glob('mapo_suite-*.whl')
    code, output = command(*pip, 'install', '--no-deps', '--no-index', '--target', tmp_path/'empty', wheel,
                           cwd=tmp_path)
    assert code == 0, output
    return tmp_path/'empty'


def test_wheel_runs_a_tiny_agent_and_the_command_line(installed, tmp_path):
    code, output = Warm(f'HERE = {str(installed)!r}\n{AGENT}', said=tmp_path/'said', cwd=tmp_path,
                        PYTHONPATH=installed).wait()
    assert code == 0, output
    code, output = command(installed/'bin'/'mapo', 'run', '--help', cwd=tmp_path, PYTHONPATH=str(installed))
    assert code == 0 and 'preset' in output, output
    assert list((installed/'mapo'/'notebooks').glob('*.ipynb')), 'the wheel has no paper notebook'
