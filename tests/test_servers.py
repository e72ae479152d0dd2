"""The commands of the page on GPU servers, in their order, in seconds, with stand-ins for the cluster and the network.

`TINY` says what is run in the place of what the page says. `pip` and `hf` only note down what they were asked for;
`sbatch` runs its script here, all tasks of an array at once; `srun` runs its command twice at once, as two nodes
would.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPO, command

PAGE, SCRIPT = REPO/'nbs'/'servers'/'running.ipynb', REPO/'nbs'/'servers'/'array.sbatch'
TINY = {'--preset paper': '--preset smoke --arms mars_po -p n_train=12 -p iterations=1 -p updates=2 -p '
                          'reward_updates=2', 'engine=vllm': 'engine=transformers',
        'tensor_parallel=4': 'tensor_parallel=1', 'data_parallel=2': 'data_parallel=1',
        'launch=fsdp': 'launch=', 'processes=8': 'processes=1', '--array=0-4': '--array=0-1',
        "SEEDS='0 1 2 3 4'": "SEEDS='0 1'", 'sleep 5': 'sleep 2'}

RUN = f'#!{sys.executable}\nimport json, os, subprocess, sys\nargs = sys.argv[1:]\n'
NOTE = RUN + "print(json.dumps([os.path.basename(sys.argv[0]), *args]), file=open(os.environ['ASKED'], 'a'))\n"
STANDINS = {
    'pip': NOTE, 'hf': NOTE, 'scontrol': NOTE,
    'srun': RUN + "while args[0].startswith('--'): args.pop(0)\nsys.exit(max(p.wait() for p in [subprocess.Popen(args) "
                  "for _ in range(2)]))\n",
    'sbatch': NOTE + '''
given = dict(a.removeprefix('--').partition('=')[::2] for a in args[:-1])
first, last = given['array'].split('-') if 'array' in given else (0, 0)
place = lambda i: dict(SLURM_JOB_ID=str(7 + i)) | (dict(SLURM_ARRAY_TASK_ID=str(i)) if 'array' in given else {})
jobs = [subprocess.Popen(['bash', args[-1]], stdout=sys.stderr, env=os.environ | place(i))
        for i in range(int(first), int(last) + 1)]
if failed := [j.args for j in jobs if j.wait()]: sys.exit(f'{len(failed)} of {len(jobs)} tasks failed')
print(7 if 'parsable' in given else 'Submitted batch job 7')
'''}


def page(): return nbformat.read(PAGE, as_version=4)


def blocks():
    "The page's blocks of shell commands, each command on one line."
    prose = '\n'.join(c.source for c in page().cells if c.cell_type == 'markdown')
    return [re.sub(r'\\\n +', '', b) for b in re.findall(r'^```sh\n(.*?)^```', prose, re.M | re.S)]


def tiny(text):
    for said, run in TINY.items(): text = text.replace(said, run)
    data = os.environ['MAPO_SHARED_DATA'] # in the place of a download; where it is not, nothing is loaded
    if os.path.isdir(f'{data}/gsm8k'): return text.replace("benchmark('gsm8k+math', ''", f"benchmark('gsm8k', '{data}'")
    return re.sub(r'^print\(benchmark.*\)"$', '"', text, flags=re.M)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Stand-ins on the path, and a folder that all nodes share."
    (tmp_path/'bin').mkdir()
    for name, code in STANDINS.items():
        (tmp_path/'bin'/name).write_text(code)
        (tmp_path/'bin'/name).chmod(0o755)
    for name in ('MAPO_RUNS', 'HF_HOME'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PATH', os.pathsep.join([str(tmp_path/'bin'), os.path.dirname(sys.executable),
                                                os.environ['PATH']]))
    monkeypatch.setenv('ASKED', str(tmp_path/'asked'))
    monkeypatch.setenv('SCRATCH', str(tmp_path/'scratch'))
    return tmp_path


def bash(text, cluster, timeout):
    (cluster/'commands.sh').write_text('set -euo pipefail\n' + text)
    done = subprocess.run(['bash', cluster/'commands.sh'], cwd=REPO, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=timeout)
    assert done.returncode == 0, f'{text}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}'
    return done.stdout, done.stderr


def asked(cluster, *words):
    "What a stand-in was asked for."
    lines = map(json.loads, (cluster/'asked').read_text().splitlines())
    return [line[len(words):] for line in lines if line[:len(words)] == [*words]]


@pytest.mark.slow
def test_the_page_from_top_to_bottom(cluster):
    "Install, download, plan, run, run again, results, the array and the job after it, locks."
    out, _ = bash('\n'.join(map(tiny, blocks())), cluster, 900)
    root = cluster/'scratch'/'mapo'
    records = {tuple(r['parameters']['seeds']): r
               for r in (json.loads(p.read_text()) for p in root.glob('*/record.json'))}
    one,whole = records[0,],records[0, 1]
    assert all(s['reused'] for s in one['stages']), 'the same command, given again, did something twice'
    assert (whole['stages']
            and all(s['reused'] for s in whole['stages'])), 'the job after the array found a stage that nobody had made'
    assert (root/whole['id']/'report.ipynb').exists() and (root/whole['id']/'record'/'results.parquet').exists()
    done = re.findall(r'(\S+) done in', ''.join(p.read_text() for p in root.glob('*/log.txt')))
    assert len(done) == len(set(done)) == len(list(root.glob('artifacts/*/manifest.json'))), 'a stage was made twice'
    assert out.count('locked by') == 1, 'two processes had the lock at once'
    assert {*records} == {(0,), (1,), (0, 1)} and one['command'] in out, '`mapo runs` lists the commands'


def test_what_is_installed_and_downloaded_is_there(cluster):
    "The constraints and the extra exist; every model of the preset is downloaded, by options that `hf` has."
    bash('\n'.join(b for b in blocks() if b.startswith(('pip ', 'hf '))), cluster, 60)
    [pip] = asked(cluster, 'pip', 'install')
    assert pip == ['-c', 'constraints-gpu.txt', '-e', '.[vllm]']
    assert (REPO/'constraints-gpu.txt').exists() and re.search(r'^vllm = ', (REPO/'pyproject.toml').read_text(), re.M)
    from mapo.mars_po import MARS_PO
    s, fetched = MARS_PO.settings('paper'), asked(cluster, 'hf', 'download')
    assert {*s.agents, s.reward_model} == {words[0] for words in fetched}
    _, usage = command('hf', 'download', '--help', cwd=REPO, PATH=os.path.dirname(sys.executable))
    assert all(option in usage for words in fetched for option in words if option.startswith('--'))


def test_every_command_of_mapo_is_one_that_there_is(cluster):
    "As the page says them, at paper size: parameters that exist, of the right types."
    from mapo.cli import _given, _parser, checked
    said = {line for b in blocks() for line in b.splitlines() if line.startswith('mapo ')}
    assert {line.split()[1] for line in said} == {'plan', 'run', 'runs'}
    for line in said - {'mapo runs'}:
        args = _parser().parse_args(shlex.split(line)[1:])
        names = [args.experiment] if isinstance(args.experiment, str) else args.experiment
        assert all(checked(name, _given(args))['preset'] == 'paper' for name in names)
    array = next(b for b in blocks() if 'SETTINGS=' in b)
    told = next(line for line in said if ' run ' in line)
    assert re.search(r'SETTINGS="(.*)"', array)[1] in told, 'the array is told something else than the machine'


def test_the_plan_of_the_page_is_a_plan(cluster):
    [line] = {line for b in blocks() for line in b.splitlines() if line.startswith('mapo plan')}
    out, _ = bash(line, cluster, 120)
    assert 'Qwen2.5-Math-RM-72B' in out and 'GPU-hours' in out
    without = subprocess.run(shlex.split(line.replace('-p tensor_parallel=4 ', '')), capture_output=True, text=True,
                             timeout=120)
    assert (without.returncode and 'does not fit' in without.stderr
            and 'tensor_parallel=4' in without.stderr), without.stderr


def shown(notebook):
    return [o.get('text') or o.data['text/plain'] for c in notebook.cells for o in c.get('outputs', [])]


def test_the_page_shows_the_plans_and_the_script_of_today():
    notebook = page()
    NotebookClient(notebook, resources=dict(metadata=dict(path=str(PAGE.parent)))).execute()
    assert shown(page()) == shown(notebook), 'execute nbs/servers/running.ipynb again'
    assert SCRIPT.read_text() in shown(page())[-1] and subprocess.run(['bash', '-n', SCRIPT]).returncode == 0


@pytest.mark.parametrize('missing', ['PAPER', 'SETTINGS', 'MAPO_RUNS', 'SEEDS'])
def test_the_script_says_what_it_was_not_told(missing, cluster):
    env = os.environ | {k: 'x' for k in ('PAPER', 'SETTINGS', 'MAPO_RUNS', 'SEEDS') if k != missing}
    env.pop(missing, None)
    done = subprocess.run(['bash', SCRIPT], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode and f'{missing}: ' in done.stderr, done.stderr


def test_a_task_near_its_time_limit_goes_back_into_the_queue(cluster):
    "Slurm sends USR1 to the script, as its head asks for."
    (cluster/'bin'/'mapo').write_text('#!/usr/bin/env bash\ntouch "$MAPO_RUNS/started"\nexec sleep 60\n')
    (cluster/'bin'/'mapo').chmod(0o755)
    env = dict(PAPER='malt', SETTINGS='--preset smoke', MAPO_RUNS=str(cluster), SLURM_JOB_ID='77',
               SLURM_ARRAY_TASK_ID='3')
    job = subprocess.Popen(['bash', SCRIPT], env=os.environ | env, start_new_session=True)
    try:
        for _ in range(200):
            if (cluster/'started').exists(): break
            time.sleep(.05)
        os.kill(job.pid, signal.SIGUSR1)
        job.wait(timeout=30)
    finally: os.killpg(job.pid, signal.SIGKILL)
    assert '#SBATCH --signal=B:USR1@' in SCRIPT.read_text() and '#SBATCH --requeue' in SCRIPT.read_text()
    assert asked(cluster, 'scontrol') == [['requeue', '77']]
