"""Runs that are killed, run twice at once, or run out of disk."""
import json, os, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import command
from mapo.agents import Model
from mapo.runs import Run, StaleCode, runs, write_json
from warm import Warm

EXPERIMENT = """
from mapo.experiment import experiment
from mapo.mars_po import MARS_PO
from mapo.runs import Run
settings = MARS_PO.settings('smoke', n_train=12, n_dev=8, n_test=8, chunk_answers=16, checkpoint_every=1)
print(experiment(Run('mars_po', dict(preset='smoke')), MARS_PO, settings, 'mars_po', [0], 'dev'))
"""


def start(root, code=EXPERIMENT): return Warm(code, said=root/'said', MAPO_RUNS=root)


def finish(process):
    code,said = process.wait()
    assert code == 0, said
    return said


def kill_when(process, happened):
    "kill -9 the whole process group as soon as something is there."
    while process.poll() is None and not happened(): time.sleep(.01)
    assert process.poll() is None, 'it ended before it could be killed'
    process.kill()


def contents(root):
    "The hash of every file of every artifact, by the artifact's name."
    return {p.parent.name: json.loads(p.read_text())['files'] for p in Path(root).glob('artifacts/*/manifest.json')}


def made(said): return {line.split()[1] for line in said.splitlines() if ' done in ' in line}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('undisturbed')
    finish(start(root))
    return root


@pytest.fixture(scope='module')
def undisturbed(root): return contents(root)


@pytest.mark.slow
def test_killed_and_started_again_the_bytes_are_those_of_an_undisturbed_run(undisturbed, tmp_path):
    "Killed in the middle of sampling, started again, killed in the middle of a training, and between two trainings."
    accidents = [lambda: len([*tmp_path.glob('artifacts/sample_alone-*.partial/scratch/chunk-*.jsonl')]) >= 2,
                 lambda: [*tmp_path.glob('artifacts/train-*.partial/model/checkpoints/checkpoint-2/checksums.json')],
                 lambda: [p for p in tmp_path.glob('artifacts/train-*/manifest.json') if p.parent.suffix != '.partial']]
    finished = set()
    for happened in accidents:
        kill_when(process := start(tmp_path), happened)
        assert not finished & made(process.said.read_text()), 'finished work was done twice'
        finished = {*contents(tmp_path)}
    assert not finished & made(finish(start(tmp_path))), 'finished work was done twice'
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_two_processes_on_one_run_share_the_work(undisturbed, tmp_path):
    both = [Warm(EXPERIMENT, said=tmp_path/name, MAPO_RUNS=tmp_path) for name in ('one', 'other')]
    said = [finish(p) for p in both]
    assert contents(tmp_path) == undisturbed
    assert sorted(name for text in said
                  for name in made(text)) == sorted(undisturbed), 'each stage is made by exactly one of them'
    assert any('another process is making' in text for text in said)


@pytest.mark.slow
def test_a_rerun_imports_no_torch(root, undisturbed):
    "In a new interpreter."
    code = (EXPERIMENT+"\nimport sys\nassert not {'torch', 'transformers', "
                       "'trl', 'datasets'} & set(sys.modules), 'imported'")
    code,said = command(sys.executable, '-c', code, cwd=root, MAPO_RUNS=str(root))
    assert code == 0, said
    assert not made(said) and contents(root) == undisturbed


def numbers(n):
    "n rows"
    return pd.DataFrame(dict(x=np.arange(n)))


def test_a_full_disk_is_one_sentence_and_leaves_finished_work(tmp_path, monkeypatch, capsys):
    run = Run('full', {}, root=tmp_path)
    kept = run.stage(numbers, n=3)
    monkeypatch.setattr('pyarrow.parquet.write_table',
                        lambda table, path, **_: open('/dev/full', 'wb', buffering=0).write(b'x'))
    with pytest.raises(OSError, match='the disk of .* is full: free some space and give the same command again'):
        run.stage(numbers, n=4)
    monkeypatch.undo()
    assert run.stage(numbers, n=3) == kept
    assert len(run.stage(numbers, n=4).read()) == 4


def test_killed_between_the_manifest_and_the_renaming(tmp_path, monkeypatch):
    "The work is whole, so it is not done again; by other code it is."
    made = []
    def counted(n):
        made.append(n)
        return pd.DataFrame(dict(x=np.arange(n)))
    run = Run('renaming', {}, root=tmp_path)
    artifact = run.stage(counted, n=3)
    before = artifact.manifest
    os.replace(artifact.path, artifact.path.with_suffix('.partial'))
    assert run.stage(counted, n=3).manifest == before and made == [3]
    write_json(artifact.path/'manifest.json', before | dict(source='0'*16))
    os.replace(artifact.path, artifact.path.with_suffix('.partial'))
    assert run.stage(counted, n=3).manifest == before and made == [3, 3]


def test_other_code_is_an_error_where_that_is_asked_for(tmp_path, monkeypatch):
    run = Run('strict', {}, root=tmp_path)
    made = run.stage(numbers, n=3)
    write_json(made.path/'manifest.json', made.manifest | dict(source='0'*16))
    monkeypatch.delenv('MAPO_STRICT', raising=False)
    run.stage(numbers, n=3)
    monkeypatch.setenv('MAPO_STRICT', '1')
    with pytest.raises(StaleCode, match='made by other code'): run.stage(numbers, n=3)


def test_another_library_version_is_another_key(tmp_path, monkeypatch):
    run = Run('versions', {}, root=tmp_path)
    def summed(n):
        import torch
        return pd.DataFrame(dict(x=[torch.arange(n).sum().item()]))
    kept, made = run.stage(numbers, n=3), run.stage(summed, n=3)
    monkeypatch.setattr('mapo.runs._version', lambda library: '0.0')
    assert run.stage(numbers, n=3).key == kept.key and run.stage(summed, n=3).key != made.key


def test_a_raised_version_is_another_key(tmp_path, monkeypatch):
    run = Run('versions', {}, root=tmp_path)
    made = run.stage(numbers, n=3)
    monkeypatch.setattr(numbers, 'version', 2, raising=False)
    assert run.stage(numbers, n=3).key != made.key


def asked_of(model, n): return pd.DataFrame(dict(x=np.arange(n)))


def test_other_weights_under_the_same_name_are_another_key(tmp_path):
    run = Run('weights', {}, root=tmp_path)
    made = run.stage(asked_of, model=Model('agent', 'tiny:products'), n=3)
    assert run.stage(asked_of, model=Model('agent', 'tiny:products'), n=3) == made
    assert run.stage(asked_of, model=Model('agent', 'tiny:borrows'), n=3).key != made.key
    assert run.stage(asked_of, model=Model('agent', 'tiny:products'), n=4).key != made.key


def test_the_record_says_how_to_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_'+'x'*30)
    run = Run('said', dict(preset='tiny', note='hf_'+'x'*30), root=tmp_path)
    run.stage(numbers, n=3)
    run.record()
    text = (run.folder/'record.json').read_text()
    assert 'hf_x' not in text and str(Path.home()) not in text
    assert runs(tmp_path).command.tolist() == ["mapo run said -p preset=tiny -p "
                                               "'note=***'"] or '***' in runs(tmp_path).command[0]
