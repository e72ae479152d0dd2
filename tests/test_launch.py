"""A training in several processes: the same numbers as in one, no orphans, and a sentence for whatever goes wrong.

A launch takes seconds (every process imports torch), so each is used for as many questions as it can answer. FSDP and
ZeRO-3 run here on a CPU, with gloo: accelerate is told that the CPU is the accelerator that they want.
"""
import os, signal, socket, subprocess, sys, threading, time
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from mapo import training
from mapo.agents import Model
from mapo.engines import load_model, save_model
from mapo.training import DPO, LAUNCH, SFT, Launch, Reward, check_launch, reference_log_probabilities, train
from test_training import make_pairs, random_model
from warm import Warm

TWO = Launch('ddp', 2)
K = dict(batch_size=4, learning_rate=1e-3, schedule='cosine', warmup=.2, updates=4)
SETTINGS = dict(sft=SFT(**K), sft_cut=SFT(**K, micro_batch_size=1, gradient_checkpointing=True),
                sft_lora=SFT(**K, lora_rank=4),
                dpo=DPO(**K, alpha=.4), dpo_lora=DPO(**K, alpha=.4, lora_rank=4, micro_batch_size=2),
                reward=Reward(**K))


@pytest.fixture(scope='module')
def initial(tmp_path_factory): return random_model(tmp_path_factory.mktemp('models')/'initial')


@pytest.fixture(scope='module')
def table(initial): return reference_log_probabilities(initial, make_pairs(11), DPO())


@pytest.fixture(scope='module')
def untied(initial, tmp_path_factory):
    "As a 7-8 B model is: the head has weights of its own."
    net,made = load_model(initial, 'cpu')
    net.config.tie_word_embeddings = False
    torch.manual_seed(2)
    return Model('untied', str(save_model(type(net)(net.config), made, tmp_path_factory.mktemp('models')/'untied')))


def trained(name, initial, table, folder, settings=None, **how):
    "Rows of very unequal lengths: a mean over tokens is no mean of the processes' means."
    settings,pairs = settings or SETTINGS[name],make_pairs(11)
    if name.startswith('sft'):
        return train(initial, pairs.rename(columns={'chosen': 'completion'}), settings, folder, **how)
    if name.startswith('dpo'): return train(initial, pairs, settings, folder, table, **how)
    return train(initial, pairs, settings, folder, **how)


def job(name, initial, table, folder, launch, monkeypatch, **how):
    "Write down what a training would launch."
    def write(job, report):
        training._write_job(job, folder/'launch')
        raise InterruptedError
    with monkeypatch.context() as m, pytest.raises(InterruptedError):
        m.setattr(training, '_launched', write)
        m.setattr(training, 'check_launch', lambda *args: None)
        trained(name, initial, table, folder, launch=launch, **how)
    return folder/'launch'


def weights(folder):
    [path] = [p for p in folder.glob('*.safetensors')]
    return load_file(path)


def agree(log, folder, whole, atol=2e-4):
    "Losses and gradient norms to 1e-5 of their size; weights to what Adam makes of a gradient's last digits."
    assert log.step.tolist() == whole.log.step.tolist()
    for name in {'loss', 'nll', 'margin', 'accuracy', 'grad_norm', 'chosen_logp', 'learning_rate'} & set(log):
        np.testing.assert_allclose(log[name], whole.log[name], rtol=1e-5, atol=2e-5, err_msg=name)
    there,here = weights(folder),weights(Path(whole.model.adapter or whole.model.path))
    assert there.keys() == here.keys()
    assert max((there[n]-here[n]).abs().max().item()
               for n in here) < atol and {w.dtype for w in there.values()} == {torch.float32}


@pytest.fixture(scope='module')
def undisturbed(table, tmp_path_factory):
    "What one process makes of a kind of training from a model: the same for all strategies."
    @lru_cache
    def made(kind, model): return trained(kind, model, table, tmp_path_factory.mktemp('whole')/kind, progress=False)
    return made


# each process works on the jobs in turn; an update that is named makes the training fall over, as far as a process
# group survives it
RANKS = '''
import os, sys
from pathlib import Path
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
if sys.argv[1] != 'ddp':
    os.environ['ACCELERATE_TORCH_DEVICE'] = 'cpu'
    PartialState._prepare_backend = lambda *args, **kwargs: ('gloo', DistributedType.MULTI_GPU)
from mapo import training
original = training.ExampleTrainer.log
def log(self, logs, start_time=None):
    original(self, logs, start_time)
    falls = Path(self.args.output_dir).parent.name == 'falls' and self.state.global_step == 3
    if falls and not self.resumed: raise InterruptedError
training.ExampleTrainer.log = log
for folder in map(Path, sys.argv[2:]):
    job,_ = training._read_job(folder)
    if folder.parent.name == 'falls':
        training.ExampleTrainer.resumed = False
        try: training._work(job, folder, int(os.environ['RANK']))
        except InterruptedError: training.ExampleTrainer.resumed = True
        torch.distributed.barrier()
        job = training.replace(job, resume=str(training.sealed_checkpoint(job.folder/'checkpoints', job.inputs)))
        assert job.resume.endswith('checkpoint-2'), job.resume
    training._work(job, folder, int(os.environ['RANK']))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
'''


def strategy(name):
    return pytest.param(name, marks=pytest.mark.skipif(name == 'zero3' and not find_spec('deepspeed'),
                                                       reason='DeepSpeed is not installed'))


@pytest.mark.slow
@pytest.mark.parametrize('name', [strategy(n) for n in ('ddp', 'fsdp', 'zero3')])
def test_two_processes_compute_what_one_does(initial, untied, table, undisturbed, tmp_path, name, monkeypatch):
    "Every kind of training, whole, in passes, with adapters; and one that falls and goes on from its checkpoint."
    launch = Launch(name, 2)
    jobs = [job(kind, initial, table, tmp_path/kind, launch, monkeypatch) for kind in SETTINGS
            if (name, kind) != ('zero3', 'reward')]
    heads = [job(kind, untied, table, tmp_path/f'{kind}-untied', launch, monkeypatch) for kind in ('sft_cut', 'dpo')]
    falls = job('sft', initial, table, tmp_path/'falls', launch, monkeypatch, checkpoint_every=2)
    (tmp_path/'ranks.py').write_text(RANKS)
    env = os.environ | dict(TORCH_FORCE_WEIGHTS_ONLY_LOAD='1', DS_ACCELERATOR='cpu')
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', LAUNCH/f'{name}.yaml',
                           '--num_processes', '2', '--main_process_port', '0',
                           tmp_path/'ranks.py', name, *jobs, *heads, falls], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for folder in (*jobs, *heads, falls):
        kind,_,other = folder.parent.name.replace('falls', 'sft').partition('-')
        agree(training.pd.read_parquet(folder/'log.parquet'), folder.parent,
              undisturbed(kind, untied if other else initial))
    assert not (tmp_path/'falls'/'checkpoints').exists()
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.bin', '.pt', '.pth')]


@pytest.mark.slow
def test_one_launched_process_writes_the_bytes_of_none(initial, table, tmp_path, capfd):
    one,none = (trained('dpo', initial, table, tmp_path/name, launch=launch)
                for name, launch in [('one', Launch('ddp', 1)), ('none', Launch())])
    assert one.log.equals(none.log) and one.counts == none.counts
    assert one.model == replace(none.model, path=str(tmp_path/'one'))
    assert one.cost.keys() == none.cost.keys() and one.cost['tokens'] == none.cost['tokens']
    assert one.cost['updates'] == 4
    assert {p.name: p.read_bytes()
            for p in (tmp_path/'one').iterdir()} == {p.name: p.read_bytes() for p in (tmp_path/'none').iterdir()}
    out,err = capfd.readouterr()
    assert not out and 'arning' not in err


def processes(folder):
    return [p for p in psutil.process_iter(['cmdline']) if str(folder) in (p.info['cmdline'] or [])
            and p.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition, seconds=120):
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.05)


def step(folder):
    try: return int((folder/'progress').read_text().split()[0])
    except (OSError, IndexError): return 0


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_training_goes_on(initial, table, tmp_path):
    "One process dies by kill -9 after a checkpoint, the next start goes on, to the weights of an undisturbed one."
    settings,folder = DPO(**K | dict(updates=40), alpha=.4),tmp_path/'out'/'launch'
    def kill():
        wait_for(lambda: step(folder) >= 11)
        os.kill(int((folder/'process-1.pid').read_text()), signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildProcessError,
                       match=r"launched training of 'random0' died: process 1 of 2 "
                             r"was ended by SIGKILL.* goes on from the last one when"):
        trained('dpo', initial, table, tmp_path/'out', settings, launch=TWO, checkpoint_every=10, progress=False)
    killer.join()
    assert not processes(folder)
    [checkpoint] = (tmp_path/'out'/'checkpoints').iterdir()
    assert {'checksums.json', 'rng_state_0.pth', 'rng_state_1.pth',
            'optimizer.pt'} <= {p.name for p in checkpoint.iterdir()} and not (checkpoint/'training_args.bin').exists()
    with pytest.raises(ValueError, match='another model, rows or settings'):
        trained('dpo', initial, table, tmp_path/'out', settings)
    resumed = trained('dpo', initial, table, tmp_path/'out', settings, launch=TWO, progress=False)
    whole = trained('dpo', initial, table, tmp_path/'whole', settings, progress=False)
    agree(resumed.log[:20], tmp_path/'out', replace(whole, log=whole.log[:20]), atol=5e-3)
    assert len(resumed.log) == 40 and not (tmp_path/'out'/'launch').exists()
    assert not (tmp_path/'out'/'checkpoints').exists()


PARENT = '''
import sys
import pandas as pd
from mapo.agents import Model
from mapo.training import SFT, Launch, train
rows = pd.DataFrame([dict(prompt=[dict(role='user', content='1')], completion=[dict(role='assistant', content='2')])]*8)
train(Model('initial', sys.argv[1]), rows, SFT(updates=100000, batch_size=4), sys.argv[2], launch=Launch('ddp', 2))
'''


@pytest.mark.slow
def test_no_process_outlives_the_one_that_asked(initial, tmp_path):
    folder = tmp_path/'out'/'launch'
    parent = Warm(PARENT, initial.path, tmp_path/'out', said=tmp_path/'said')
    wait_for(lambda: step(folder) >= 2)
    assert len(processes(folder)) == 3
    os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not processes(folder), 20)
    assert parent.wait()[0] == -signal.SIGKILL


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(initial, table, tmp_path):
    folder = tmp_path/'out'/'launch'
    def interrupt():
        wait_for(lambda: (folder/'process-1.pid').exists())
        signal.raise_signal(signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt): trained('sft', initial, table, tmp_path/'out', launch=TWO, progress=False)
    assert not processes(folder)


@pytest.mark.slow
def test_an_error_inside_comes_back_as_its_sentence(initial, table, tmp_path):
    with pytest.raises(FloatingPointError,
                       match=r'^the (loss|grad_norm) became \w+ at update 3 of 4: lower the learning rate'):
        trained('sft', initial, table, tmp_path/'out', replace(SETTINGS['sft'], learning_rate=1e30), launch=TWO,
              checkpoint_every=2, progress=False)
    assert not processes(tmp_path/'out'/'launch') and not (tmp_path/'out'/'model.safetensors').exists()
    assert 'FloatingPointError' in (tmp_path/'out'/'launch'/'process-0.log').read_text()


def test_what_cannot_start_is_refused_before_anything_is_loaded(initial, table, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'load_model', lambda *args, **kwargs: pytest.fail('loaded'))
    monkeypatch.setattr(training.subprocess, 'Popen', lambda *args, **kwargs: pytest.fail('started'))
    go = lambda launch, **changes: trained('dpo', initial, table, tmp_path/'out', replace(SETTINGS['dpo'], **changes),
                                         launch=launch)
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f'port {port} is in use'): go(Launch('ddp', 2, port))
    with pytest.raises(ValueError, match='processes=2 in passes of micro_batch_size=4: 8 must divide it'):
        go(TWO, micro_batch_size=4)
    for name in ('fsdp', 'zero3'):
        with pytest.raises(ValueError, match=f"'{name}' shares a model between GPUs, and this machine has none"):
            go(Launch(name, 2))
    assert not (tmp_path/'out').exists()


def test_what_a_gpu_machine_refuses(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 4)
    check_launch(Launch('fsdp', 4), SFT())
    with pytest.raises(ValueError, match='processes=8, but this machine has 4 GPUs'):
        check_launch(Launch('ddp', 8), SFT())
    monkeypatch.setattr(training, 'find_spec', lambda name: name == 'deepspeed')
    with pytest.raises(ValueError, match="drawn whole, which 'zero3' cannot do: use 'fsdp'"):
        check_launch(Launch('zero3', 4), Reward())
    monkeypatch.setattr(training, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='pip install deepspeed'): check_launch(Launch('zero3', 4), SFT())
    with pytest.raises(ModuleNotFoundError, match='pip install bitsandbytes'):
        check_launch(Launch(), SFT(lora_rank=8, quantized=True))
    with pytest.raises(ValueError, match="use 'ddp', not 'fsdp'"):
        check_launch(Launch('fsdp', 4), SFT(lora_rank=8, quantized=True))


def test_one_process_uses_one_gpu(initial, tmp_path, monkeypatch):
    "transformers would spread a process over all GPUs that it sees, with as many times the batch."
    def eight(args):
        if '_n_gpu' not in vars(args): args._n_gpu = 8
        return torch.device('cpu')
    monkeypatch.setattr(training.transformers.TrainingArguments, '_setup_devices', property(eight))
    settings = SETTINGS['sft']
    job = training._Job(initial, settings, make_pairs(4), {}, '', tmp_path)
    args = training._arguments(training.SFTConfig, job)
    assert (args.n_gpu, args.train_batch_size) == (1, settings.batch_size)


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.yaml')), ids=lambda p: p.stem)
def test_configurations_are_accelerates(path):
    "accelerate refuses unknown keys at the top, and silently takes any below: those are compared with its command."
    config,known = load_config_from_file(str(path)),set(vars(launch_command_parser().parse_args(['x'])))
    assert set(config.fsdp_config) <= known and set(config.deepspeed_config) <= known
    assert config.num_processes == 8 and config.num_machines == 1
    assert config.distributed_type.value == dict(ddp='MULTI_GPU', fsdp='FSDP', zero3='DEEPSPEED')[path.stem]
    assert config.mixed_precision == ('no' if path.stem == 'zero3' else 'bf16')


@pytest.mark.skipif(not find_spec('bitsandbytes'), reason='bitsandbytes is not installed')
def test_an_adapter_is_trained_on_a_base_of_four_bits(initial, table, tmp_path):
    settings = replace(SETTINGS['dpo_lora'], quantized=True, updates=2)
    net,_ = training._quantized(initial)
    assert {p.dtype for n, p in net.named_parameters() if '_proj' in n} == {torch.uint8}
    done = trained('dpo', initial, table, tmp_path/'out', settings, progress=False)
    whole = trained('dpo', initial, table, tmp_path/'whole', replace(settings, quantized=False), progress=False)
    assert abs(done.log.loss-whole.log.loss).max() < .2 and not done.log.loss.equals(whole.log.loss)
    assert done.model.adapter and weights(tmp_path/'out').keys() == weights(tmp_path/'whole').keys()
    assert {w.dtype for w in weights(tmp_path/'out').values()} == {torch.float32}
    load_model(done.model, 'cpu')
