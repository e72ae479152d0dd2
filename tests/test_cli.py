"""The command line: what it refuses, what it shows, several experiments at once, and what is left when it is killed."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from conftest import command
from mapo import cli
from mapo.malt import MALT
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.runs import Run, runs

MAPO = str(Path(sys.executable).parent/'mapo')
SIZE = ['--preset', 'smoke', '-p', 'n_train=12', '-p', 'n_dev=6', '-p', 'n_test=6', '-p', 'batch_size=4']


@pytest.mark.parametrize('words,sentence', [
    ('mars_po --preset huge', "mars_po has no preset 'huge': there are smoke, tiny, tiny_routes, small, paper"),
    ('mars_po --arms base,star', "mars_po has no arm 'star'"),
    ('malt --split train', "malt: split must be 'dev' or 'test', not 'train'"),
    ('multiagent_ft --seeds 0 0', 'multiagent_ft: seeds must be distinct whole numbers'),
    ('mars_po --seeds -1', 'mars_po: a seed is a whole number from 0 to 4294967295, not -1'),
    ('mars_po -p seeds=["a"]', "a seed is a whole number from 0 to 4294967295, not 'a'"),
    ('mars_po -p seeds=[]', 'mars_po: seeds must be distinct whole numbers, at least one'),
    ('mars_po_rates --preset huge', "mars_po has no preset 'huge'"),
    ('malt_rates -p overrides={"n_trains":3}', "malt_rates has no parameter 'n_trains' (did you mean 'n_train'?)"),
    ('mars_po -p n_samples=0', 'n_samples must be at least 1, not 0'),
    ('malt marspo', "there is no experiment 'marspo' (did you mean 'mars_po'?)"),
    ('malt mars_po --arms malt', "mars_po has no arm 'malt'"),
    ('malt mars_po -p branching=[1,1,1]', "mars_po has no parameter 'branching'"),
    ('malt --processes -1', 'processes must be at least 1, not -1')])
def test_what_does_not_exist_is_refused_before_anything_is_there(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv('MAPO_RUNS', str(tmp_path/'runs'))
    monkeypatch.setattr(cli, '_execute', lambda *_: pytest.fail('it was started'))
    with pytest.raises(SystemExit) as stopped: cli.main(['run', *words.split()])
    said = stopped.value.code
    assert said.startswith('mapo run: ') and sentence in said and '\n' not in said
    assert not (tmp_path/'runs').exists(), 'it left something'


REFUSED = """
import sys
from mapo.cli import main
try: main(['run', 'mars_po', '--arms', 'star'])
finally: print('imported', sorted({'papermill', 'jupyter_client', 'torch'} & {*sys.modules}))
"""


def test_it_is_refused_at_once(tmp_path):
    "In three seconds; of CPU, for others may be at work here. Nothing that starts a kernel is imported."
    before = sum(os.times()[2:4])
    status, output = command(sys.executable, '-c', REFUSED, cwd=tmp_path, MAPO_RUNS=str(tmp_path/'runs'))
    assert status == 1 and 'imported []' in output and 'Traceback' not in output
    assert "mapo run: mars_po has no arm 'star'" in output
    assert sum(os.times()[2:4]) - before < 3


def told(env, **event):
    with open(env['MAPO_PROGRESS'], 'a') as f: print(json.dumps(event), file=f)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    "Sets what an experiment does in the place of its notebook; returns the folder of its runs."
    monkeypatch.setenv('MAPO_RUNS', str(tmp_path))
    def set(**does):
        def execute(name, values, fresh, env, show):
            run = Run(name, values)
            does[name](env, show)
            return run
        monkeypatch.setattr(cli, '_execute', execute)
        return tmp_path
    return set


def test_one_that_fails_does_not_keep_the_others_from_finishing(pretend, capsys):
    finished = []
    def fails(env, show): raise ValueError('the data are gone')
    def works(env, show):
        time.sleep(.5)
        finished.append(True)
    pretend(mars_po=fails, malt=works)
    with pytest.raises(SystemExit) as stopped: cli.main(['run', 'mars_po', 'malt', '--preset', 'smoke'])
    assert stopped.value.code == 'mapo run: mars_po: the data are gone' and finished
    out, err = capsys.readouterr()
    assert 'mars_po  failed: the data are gone' in err and 'malt     finished after' in err
    assert 'malt-' in out and 'mars_po-' not in out


def test_where_it_is_not_a_terminal_there_is_a_line_for_each_arm_and_no_bar(pretend, capsys):
    def works(env, show):
        for arm in ('base', 'mars_po'):
            told(env, arm=arm, seed=0)
            for iteration in (1, 2):
                told(env, begins='sample_alone', iteration=iteration)
                told(env, ends='sample_alone', reused=arm == 'base', wall_s=2.)
        told(env, arm='', seed=0)
        show('the disk is nearly full')
    pretend(mars_po=works)
    cli.main(['run', 'mars_po', '--preset', 'smoke', '--arms', 'mars_po'])
    err = capsys.readouterr().err
    assert '\r' not in err
    lines = err.splitlines()
    assert lines.count('mars_po  the disk is nearly full') == 1
    assert [line.split(':')[0] for line in lines if ' stages' in line] == ['mars_po  base', 'mars_po  mars_po'], err
    asked = len(cli.outlined('mars_po', cli.checked('mars_po', dict(preset='smoke', arms='mars_po'))).steps)
    [base] = [line for line in lines if ' base: ' in line]
    assert base.startswith('mars_po  base: nothing to make; ') and f' of {asked} stages' in base


def test_at_most_so_many_at_once(pretend):
    at_work, most = [], []
    def works(env, show):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(.3)
        at_work.pop()
    pretend(mars_po=works, malt=works, multiagent_ft=works)
    for processes, wanted in ((1, 1), (2, 2)):
        most.clear()
        cli.main(['run', 'mars_po', 'malt', 'multiagent_ft', '--preset', 'smoke', '--processes', str(processes)])
        assert max(most) == wanted and len(most) == 3


def test_small_models_get_one_thread_unless_somebody_says_otherwise(pretend, monkeypatch):
    given = []
    pretend(mars_po=lambda env, show: given.append(env.get('OMP_NUM_THREADS')))
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    cli.main(['run', 'mars_po', '--preset', 'smoke'])
    monkeypatch.delenv('OMP_NUM_THREADS')
    cli.main(['run', 'mars_po', '--preset', 'smoke'])
    cli.main(['run', 'mars_po', '--preset', 'small'])
    assert given == [None, '1', None]


def test_ctrl_c_ends_every_process_that_was_started(pretend, capsys):
    started, others = [], {*psutil.Process().children(recursive=True)}
    def works(env, show):
        code = 'import subprocess; subprocess.run(["sleep", "100"])'
        own = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)
        while not psutil.Process(own.pid).children(): time.sleep(.05)
        started.append(own)
        if len(started) == 2: os.kill(os.getpid(), signal.SIGINT)
        own.wait()
        raise RuntimeError('Kernel died')
    root = pretend(mars_po=works, malt=works, multiagent_ft=works)
    words = ['run', 'mars_po', 'malt', 'multiagent_ft', '--preset', 'smoke', '--processes', '2']
    with pytest.raises(SystemExit) as stopped: cli.main(words)
    assert stopped.value.code == 130
    assert 'mapo: interrupted; what is finished is kept' in capsys.readouterr().err
    assert len(started) == 2 and not {*psutil.Process().children(recursive=True)} - others, 'something is still at work'
    assert runs(root).status.tolist() == ['stopped', 'stopped']


def content(path):
    "What a file of a record holds, without what was measured on the clock."
    if path.name == 'manifest.json': return {k: v for k, v in json.loads(path.read_text()).items() if k != 'cost'}
    clock = ['seconds', 'peak_bytes']
    if path.name == 'budget.csv': return pd.read_csv(path).drop(columns=clock, errors='ignore').to_csv()
    return path.read_bytes()


def contents(root):
    "Every artifact and every record of a folder of runs."
    artifacts = {p.parent.name: json.loads(p.read_text())['files'] for p in root.glob('artifacts/*/manifest.json')}
    return artifacts | {str(p.relative_to(root)): content(p) for p in root.glob('*/record/*') if p.name != 'time.csv'}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "Two experiments side by side, and one of them alone: folder, what was said and what was printed."
    done = {}
    for names in (('malt', 'multiagent_ft'), ('multiagent_ft',)):
        root = tmp_path_factory.mktemp('-'.join(names))
        env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'} | dict(MAPO_RUNS=str(root))
        words = [MAPO, 'run', *names, *SIZE, '--processes', '2']
        ended = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stderr
        done[len(names)] = root, ended.stderr, ended.stdout
    return done


def test_side_by_side_every_byte_is_that_of_an_experiment_alone(ran):
    together, alone = (contents(ran[experiments][0]) for experiments in (2, 1))
    assert alone.keys() < together.keys() and len(alone) > 30
    assert [name for name in alone if together[name] != alone[name]] == []


def test_what_a_person_sees(ran):
    root, said, printed = ran[2]
    lines = said.splitlines()
    arms = [line.split()[1].rstrip(':') for line in lines if ' stages' in line]
    assert sorted(arms) == sorted(arm.name for experiment in (MALT, MULTIAGENT_FT) for arm in experiment.choose('core'))
    assert len(lines) == len(arms) + 2 and sum(' finished after ' in line for line in lines) == 2, said
    for name in ('malt', 'multiagent_ft'):
        [run] = root.glob(f'{name}-*')
        assert f'{run.name}\n' in printed and f'report   {run}/report.ipynb\nfigures  {run}/figures' in printed
        assert run.name not in said, 'hashes'
    assert 'MALT without vote' in printed and 'single-agent FT' in printed and printed.count('Holm-corrected') == 2


def test_runs_are_listed_with_date_status_size_and_accuracy(ran, monkeypatch, capsys):
    monkeypatch.setenv('MAPO_RUNS', str(ran[2][0]))
    cli.main(['runs'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for name in ('malt', 'multiagent_ft'):
        [line] = [line for line in lines if f' {name}-' in line]
        date, clock, status, size, arm, accuracy = line.split()[:6]
        assert (status, size, arm) == ('finished', 'smoke', name) and 0 <= float(accuracy) <= 1
        assert re.search(r'  [1-9]\d* MB  ', line)
    assert lines[1].strip().startswith('mapo run ')


def said_of(words, capsys):
    cli.main(words)
    return capsys.readouterr().out


def test_a_run_is_shown_by_the_beginning_of_its_name(ran, monkeypatch, capsys):
    monkeypatch.setenv('MAPO_RUNS', str(ran[2][0]))
    [run] = ran[2][0].glob('malt-*')
    shown = said_of(['show', 'malt'], capsys)
    assert shown.startswith(f'{run.name}  finished  ')
    assert 'n_train 12' in shown and 'preset   smoke' in shown and '  seeds    0\n' in shown
    [stages] = [line for line in shown.splitlines() if line.startswith('train ')]
    trainings = [s for s in json.loads((run/'record.json').read_text())['stages'] if s['stage'] == 'train']
    assert int(stages.split()[1]) == len({s['key'] for s in trainings})
    most = pd.read_csv(run/'record'/'budget.csv').tokens_trained.max()
    assert int(stages.split()[-1].replace(',', '')) > most
    assert 'MALT without vote' in shown and f'record   {run}/record' in shown


def test_what_is_shown_fits_a_narrow_terminal(ran, monkeypatch, capsys):
    monkeypatch.setenv('MAPO_RUNS', str(ran[2][0]))
    monkeypatch.setenv('COLUMNS', '64')
    lines = said_of(['show', 'malt'], capsys).splitlines()
    assert [line for line in lines if len(line) > 64 and str(ran[2][0]) not in line] == []
    assert sum(line.startswith('MALT without vote') for line in lines) > 1, 'its columns do not follow below'


def test_a_run_repeated_elsewhere_is_no_different(ran, capsys):
    folders = [str(next(ran[n][0].glob('multiagent_ft-*'))) for n in (1, 2)]
    lines = said_of(['compare', *folders], capsys).splitlines()
    rows = [line for line in lines if '.000 [.000, .000]' in line]
    assert len(rows) == len(MULTIAGENT_FT.choose('core')) and 'Not paired' not in '\n'.join(lines)


def test_runs_on_other_problems_are_compared_unpaired_and_it_is_said(ran, monkeypatch, capsys):
    monkeypatch.setenv('MAPO_RUNS', str(ran[2][0]))
    said = said_of(['compare', 'malt', 'multi', '--arm', 'malt', '--arm', 'debate'], capsys)
    assert 'Not paired: MALT, for they answered 6 and 6 problems, of which ' in said and 'Where p stands' not in said


@pytest.mark.parametrize('words,sentence', [
    ('show marspo', 'there is no run'), ('verify multiagent-ft', "did you mean 'multiagent_ft'?"),
    ('publish nobody', 'there is no run'),
    ('compare malt multi', 'have no arm in common'), ('compare malt malt', 'is not held against itself'),
    ('compare malt multi --arm malt --arm debate --arm base', '--arm names an arm of each run'),
    ('compare malt multi --arm malt', "has no arm 'malt'")])
def test_what_cannot_be_looked_at_is_one_sentence(words, sentence, ran, monkeypatch):
    monkeypatch.setenv('MAPO_RUNS', str(ran[2][0]))
    with pytest.raises(SystemExit) as stopped: cli.main(words.split())
    assert sentence in stopped.value.code and '\n' not in stopped.value.code


def test_damage_is_found_and_ends_with_1(ran, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(ran[1][0], tmp_path/'runs')
    monkeypatch.setenv('MAPO_RUNS', str(root))
    assert said_of(['verify', 'multi'], capsys).endswith('all as they were made\n')
    first, second, third = sorted(root.glob('artifacts/train-*/'))[:3]
    weights = first/'model'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    (second/'log.parquet').unlink()
    shutil.rmtree(third)
    with pytest.raises(SystemExit) as stopped: cli.main(['verify', 'multi'])
    assert re.match(r'mapo verify: 3 of \d+ stages of multiagent_ft-\w+ are damaged', stopped.value.code)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f'{first.name}/model/model.safetensors is not what was written', f'{second.name}/log.parquet is missing',
        f'{third.name} is missing']


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_a_shell_completes_commands_and_experiments():
    pytest.importorskip('shtab')
    ask = '; COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _shtab_mapo; echo "${COMPREPLY[@]}"'
    script = f'source <({MAPO} completion bash); ' + '; '.join(
        f'COMP_WORDS=({words}){ask}' for words in ('mapo sho', 'mapo run mal', 'mapo plan --pre'))
    ended = subprocess.run(['bash', '-c', script], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == ['show', 'malt malt_rates', '--preset'], ended.stderr


def test_a_small_run_had_one_thread(ran):
    records = [json.loads(p.read_text()) for p in ran[2][0].glob('*/record.json')]
    assert [record['machine']['threads'] for record in records] == ['1', '1']


def family(process): return [process, *process.children(recursive=True)]


def outlive(processes, seconds):
    "Those that are still there after so many seconds; one that ended and whom nobody has asked after is not."
    def ended(process):
        try: return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return True
    until = time.time()+seconds
    while time.time() < until and not all(map(ended, processes)): time.sleep(.02)
    return [process for process in processes if not ended(process)]


def test_killed_with_its_group_its_kernel_goes_too_and_the_same_command_goes_on(tmp_path):
    words, env = [MAPO, 'run', 'mars_po', *SIZE, '--arms', 'base'], os.environ | dict(MAPO_RUNS=str(tmp_path))
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start = lambda: subprocess.Popen(words, env=env, start_new_session=True, **piped)
    first = start()
    while not [*tmp_path.glob('artifacts/sample_alone-*.partial')]:
        assert first.poll() is None, first.communicate()
        time.sleep(.02)
    everybody = family(psutil.Process(first.pid))
    assert len(everybody) > 1, 'it has no kernel'
    os.killpg(first.pid, signal.SIGKILL)
    alive = outlive(everybody[1:], 2)
    first.communicate()
    assert not alive, 'a process outlived the command by two seconds'
    assert runs(tmp_path).status.tolist() == ['killed']
    again = start()
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and 'another process' not in said, said
    assert runs(tmp_path).status.tolist() == ['finished']


@pytest.mark.skipif(sys.platform != 'linux', reason='ipykernel looks for its parent itself, once a second')
def test_a_process_that_lets_nothing_else_run_goes_with_its_parent_too():
    "ipykernel's own look for its parent needs the interpreter's lock, which a long computation keeps."
    child = 'import os, mapo.cli; mapo.cli.die_with(os.getppid()); print(os.getpid(), flush=True); sum(range(10**12))'
    code = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    busy = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    alive = outlive([busy], 2)
    for process in alive: process.kill()
    assert not alive


def test_help_explains_the_parameters_of_an_experiment(capsys):
    for words in ('run mars_po malt -h', 'plan mars_po --help'):
        with pytest.raises(SystemExit) as stopped: cli.main(words.split())
        assert not stopped.value.code
        out = capsys.readouterr().out
        assert 'usage: mapo ' in out
        assert 'alpha_last (float)                 weight of the likelihood term in the last iteration' in out
        assert ('branching (list)' in out) == ('malt' in words)
    with pytest.raises(SystemExit): cli.main(['run', '-h'])
    assert "mars_po              Agents learn from each other's right answers" in capsys.readouterr().out
