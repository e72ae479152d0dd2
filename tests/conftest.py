"What all tests share: no network, one thread, one run root, a copy of the repository, and work that is done once."
import gc
import json
import os
import signal
import shutil
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import pytest
from filelock import FileLock

REPO = Path(__file__).resolve().parents[1]
# 'gw0', 'gw1', ...; None in the process that was called, which starts the workers
WORKER = os.environ.get('PYTEST_XDIST_WORKER')

# set before any test imports torch; subprocesses inherit them
for name, value in {'OMP_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1',
                    'HF_HUB_DISABLE_TELEMETRY': '1', 'MAPO_SHARED_DATA': str(REPO.parent/'shared'/'data')}.items():
    os.environ.setdefault(name, value)
if not WORKER: os.environ['MAPO_TESTS'] = tempfile.mkdtemp(prefix='mapo-tests-')
SESSION = Path(os.environ['MAPO_TESTS']) # of all workers, fresh for each session
os.environ['MAPO_RUNS'] = str(SESSION/'runs')
# a shell starts what runs in the background without it, and tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish():
    import warm
    warm.stop()
    if not WORKER: shutil.rmtree(SESSION, ignore_errors=True)


# What the two workers begin with: the groups that take longest, so that both end at about the same time.
LONGEST = ['launch', 'mars_po', 'multiagent_ft', 'malt', 'servers', 'from_one_problem', 'specialization', 'runs',
           '09_training', 'docs', '14_figures', 'training']


def group(item): return item.get_closest_marker('xdist_group').args[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "One worker takes a file's tests, or those that are marked as a group: what they share is made once."
    for item in items:
        if not item.get_closest_marker('xdist_group'):
            item.add_marker(pytest.mark.xdist_group(item.path.stem.removeprefix('test_')))
    if not WORKER: return
    items.sort(key=lambda item: LONGEST.index(group(item)) if group(item) in LONGEST else len(LONGEST))
    (SESSION/f'groups-{WORKER}.json').write_text(json.dumps({item.nodeid: group(item) for item in items}))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes a group.

    What xdist 3.8 does itself for `loadgroup` has no effect under pytest 9.2, which no longer reads the attribute that
    it sets.
    """
    if config.getvalue('dist') != 'loadgroup': return None
    from xdist.scheduler import LoadScopeScheduling
    class Groups(LoadScopeScheduling):
        @cached_property
        def known(self): return json.loads(next(SESSION.glob('groups-*.json')).read_text())
        def _split_scope(self, nodeid): return self.known[nodeid]
    return Groups(config, log)


def pytest_runtest_setup():
    "Trainings make Python's collector walk over all that is alive; half a million objects of libraries are put aside."
    if gc.get_freeze_count() > 200_000 or 'torch' not in sys.modules: return
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def runs():
    "One run root for all tests that look at finished work: equal stages are made once."
    return SESSION/'runs'


def once(name, make):
    "The folder `name` of this session, which `make(folder)` fills; another worker that wants it waits."
    folder = SESSION/name
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            unfinished = folder.with_suffix('.unfinished')
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def tracked():
    "The repository's files, those to be added included, as paths relative to it."
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=REPO, capture_output=True,
                           text=True, check=True)
    return [Path(n) for n in names.stdout.split('\0') if n and (REPO/n).is_file()]


def copied(folder):
    for path in tracked():
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO/path, folder/path)
    return folder


@pytest.fixture
def copy(tmp_path):
    "A copy of the working tree: what a test changes there is lost."
    return copied(tmp_path/'mapo-copy')


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    "A copy of the working tree for tests that leave it as it is."
    return copied(tmp_path_factory.mktemp('checkout')/'mapo-copy')


def command(*words, cwd, timeout=300, **env):
    "Run a command of this environment, stop it and its children after `timeout` seconds, return (exit code, output)."
    env = os.environ | {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'} | env
    process = subprocess.Popen(words, cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try: output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f'{" ".join(map(str, words))} took over {timeout} s:\n{output[-4000:]}')
    return process.returncode, output
