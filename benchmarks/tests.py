"""What the test suite costs, test by test: `python benchmarks/tests.py [--over SECONDS] [arguments of pytest]`.

Without arguments it is what `make test` runs. CPU-seconds are those of the test's process and of every process that
it waited for, forks of `tests/warm.py` included; a fixture's are counted with the test that asked for it first.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MAKE_TEST = ['-n', '2', '--dist', 'loadgroup', '--no-loadscope-reorder']


def cpu_seconds():
    "Of this process and of those it has waited for; of forks that the library server has waited for, too."
    t = os.times()
    server = getattr(getattr(sys.modules.get('warm'), 'Warm', None), 'server', None)
    if not server: return sum(t[:4])
    fields = Path(f'/proc/{server.pid}/stat').read_text().rpartition(')')[2].split()
    return sum(t[:4]) + sum(map(int, fields[11:15]))/os.sysconf('SC_CLK_TCK')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    cpu, wall = cpu_seconds(), time.monotonic()
    done = yield
    with open(os.environ['MAPO_TEST_TIMES'], 'a') as f:
        print(json.dumps(dict(test=item.nodeid.partition('@')[0], cpu=round(cpu_seconds()-cpu, 2),
                              wall=round(time.monotonic()-wall, 2), worker=os.environ.get('PYTEST_XDIST_WORKER', ''))),
              file=f)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--over', type=float, default=10, metavar='SECONDS',
                        help='show tests that took more CPU-seconds or wall seconds')
    parser.add_argument('--times', help='keep the times of all tests in this file, a JSON object per line')
    given, rest = parser.parse_known_args()
    times = Path(given.times or Path(tempfile.mkdtemp())/'times.jsonl').resolve()
    times.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    env = os.environ | dict(MAPO_TEST_TIMES=str(times), PYTHONPATH=paths)
    started = time.monotonic()
    code = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'tests', '-p', 'no:cacheprovider',
                           *(rest or MAKE_TEST)], cwd=REPO, env=env).returncode
    wall, used = time.monotonic()-started, resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = sorted(map(json.loads, times.read_text().splitlines()), key=lambda r: -r['cpu'])
    print(f'\n{len(rows)} tests, {wall/60:.1f} min, {used.ru_utime+used.ru_stime:,.0f} CPU-s, exit status {code}\n\n| '
          f'test | CPU-s | wall s |\n|---|---|---|')
    for r in rows:
        if max(r['cpu'], r['wall']) > given.over:
            print(f"| `{r['test'].removeprefix('tests/')}` | {r['cpu']:.1f} | {r['wall']:.1f} |")
    sys.exit(code)


if __name__ == '__main__': main()
