"A plan counts what a run does, knows models without loading them, and starts nothing."
import json
import sys
from collections import Counter

import pytest

from conftest import REPO, command
from mapo.agents import CHECKPOINTS, Model
from mapo.mars_po import MARS_PO, all_arms, mars_po_settings, reward_scores
from mapo.methods import LICENCES
from mapo.plan import (BUDGET, CONDITIONS, CONFIGS, MAX_LENGTH, Sizes, count_parameters, licence_lines, lora_parameters, plan_mars_po, sampling_table, sizes,
                       teachers, totals, training_memory)
from mapo.runs import Run

ARMS = 'sft_own,mars_po_flipped' # stages that both ask for, examples and pairs, flipped labels, reward models that are trained


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "A real run of the smallest preset, and the plan of the same."
    folder = tmp_path_factory.mktemp('plan')
    run = Run('mars_po', dict(preset='smoke', arms=ARMS), root=folder)
    settings = mars_po_settings('smoke', checkpoint_every=2)
    reward_scores(run, settings, all_arms(run, settings, ARMS, [0], 'dev'))
    return run, plan_mars_po('smoke', ARMS, checkpoint_every=2)


def artifacts(run, kind): return [p for p in sorted(run.artifacts.glob(f'{kind}_*')) if p.is_dir()]


def test_stages_are_those_of_a_run(ran):
    run, plan = ran
    assert Counter(s['stage'] for s in run.stages) == sum((Counter({p.stage: plan.asked[p.key]}) for p in plan.planned.values()), Counter())
    assert Counter(p.name.rsplit('-', 1)[0] for p in run.artifacts.iterdir() if p.is_dir()) == Counter(p.stage for p in plan.planned.values())


def test_answers_are_those_of_a_run(ran):
    import pandas as pd
    run, plan = ran
    turns = pd.concat([pd.read_parquet(p/'turns.parquet') for p in artifacts(run, 'sample')])
    found = turns.groupby(['purpose', 'iteration']).size()
    planned = sampling_table(plan)
    assert found.to_dict() == planned.set_index(['purpose', 'iteration']).answers.to_dict()
    assert planned.requests.sum() == turns.groupby(['purpose', 'iteration', 'context_id', 'model_key', 'agent', 'split']).ngroups
    assert turns.completion_tokens.sum() <= planned.tokens.sum()
    assert turns.prompt_tokens.max() <= plan.prompt_tokens
    scores = [pd.read_parquet(p/'scores.parquet') for p in artifacts(run, 'score')]
    assert plan.table[plan.table.stage == 'score_turns'].answers.sum() == sum(map(len, scores))


def test_trainings_are_those_of_a_run(ran):
    run, plan = ran
    logs = [json.loads((p/'log.json').read_text()) | dict(stage=p.name.split('-')[0]) for p in artifacts(run, 'tune')]
    planned = plan.table[plan.table.stage.str.startswith('tune')]
    assert planned.groupby('stage').updates.sum().to_dict() == {kind: sum(l['updates'] for l in logs if l['stage'] == kind) for kind in {l['stage'] for l in logs}}
    assert sum(l['tokens_trained'] for l in logs) <= planned.tokens.sum()
    stored = sum((p/'model'/'model.safetensors').stat().st_size for p in artifacts(run, 'tune'))
    assert planned.disk.sum() <= stored < 1.02*planned.disk.sum() # headers, and the head of a reward model
    assert (planned.resume == 3*planned.disk).all()


@pytest.mark.parametrize('name', ['products', 'borrows', 'carries', 'same-0', 'base'])
def test_parameters_are_those_in_the_file(name):
    size, file = sizes(Model(name, f'tiny:{name}')), CHECKPOINTS/name/'model.safetensors'
    header = int.from_bytes(file.read_bytes()[:8], 'little')
    assert 4*size.parameters == file.stat().st_size - 8 - header


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.split('/')[-1])
def test_parameters_are_those_that_transformers_makes(path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
    config = {k: v for k, v in CONFIGS[path].items() if k not in ('model_type', 'architectures')}
    reward = 'architectures' in CONFIGS[path]
    with torch.device('meta'):
        net = LlamaForCausalLM(LlamaConfig(**config)) if CONFIGS[path]['model_type'] == 'llama' else (Qwen2Model if reward else Qwen2ForCausalLM)(Qwen2Config(**config))
        head = [torch.nn.Linear(8192, 8192), torch.nn.Linear(8192, 1)] if reward else []
    assert sum(p.numel() for part in (net, *head) for p in part.parameters()) == count_parameters(CONFIGS[path])


def test_adapter_parameters_are_those_that_peft_makes():
    from mapo.engines import load_model
    from peft import LoraConfig, get_peft_model
    model = Model('products', 'tiny:products')
    net = get_peft_model(load_model(model, 'cpu')[0], LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == lora_parameters(sizes(model), 4)


@pytest.mark.parametrize('heads, kv_heads, intermediate', [(4, 4, 512), (8, 2, 512), (4, 1, 1024)])
def test_activations_are_what_autograd_keeps(heads, kv_heads, intermediate):
    "Bytes per token and layer: the difference between six and two layers, and between 128 and 64 tokens, under bfloat16 autocast."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    def kept(layers, tokens):
        net, found = LlamaForCausalLM(LlamaConfig(hidden_size=64*heads, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                                                  num_key_value_heads=kv_heads, vocab_size=99, attn_implementation='sdpa')), {}
        add_fused_lm_head(net)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        def keep(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights: found[storage.data_ptr()] = storage.nbytes(), t # held, so that no address is used twice
            return t
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16):
            net(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True)
        return sum(n for n, _ in found.values())

    measured = (kept(6, 128) - kept(2, 128) - kept(6, 64) + kept(2, 64))/4/64
    one = Sizes(parameters=0, layers=1, hidden=64*heads, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=64, vocabulary=99, window=0)
    assert measured == pytest.approx(training_memory(one, 'bfloat16', 1)[1], rel=.01)


def test_limits_are_those_of_engines_and_training():
    from mapo.training import Training
    assert Training().max_length == MAX_LENGTH
    assert f'else {BUDGET})' in (REPO/'mapo'/'engines.py').read_text()


def test_the_presets_models_and_licences_are_known():
    used = {m for s in MARS_PO.values() for m in (*s.agents, *s.same_agents, s.reward_model, s.reward_init) if m and not m.startswith('tiny:')}
    assert used <= CONFIGS.keys() and used <= LICENCES.keys()
    assert set(LICENCES.values()) <= CONDITIONS.keys()


def test_who_learns_from_whom():
    paper = plan_mars_po('paper', 'mars_po')
    known = teachers(paper)
    assert known['texts', 'Llama 3.1 licence', 'Llama-3.1-8B-Instruct'] == ['Qwen2.5-Math-7B-Instruct', 'deepseek-math-7b-rl']
    assert len(known['scores', 'Qwen licence', 'Qwen2.5-Math-RM-72B']) == 3
    assert 'Texts of Llama-3.1-8B-Instruct train Qwen2.5-Math-7B-Instruct, deepseek-math-7b-rl: Llama 3.1 licence.' in licence_lines(paper)
    alone = teachers(plan_mars_po('paper', 'dpo_nll', reward_model='', order='drawn'))
    assert alone == {} # own answers alone


def test_an_adapter_is_kept_instead_of_weights():
    full, adapter = (plan_mars_po('paper', 'mars_po', lora_rank=rank) for rank in (0, 16))
    assert adapter.table.disk.sum() < full.table.disk.sum()/100
    assert len(adapter.asked) == len(full.asked)


def test_agents_trained_from_scratch_are_followed_to_their_sizes():
    plan = plan_mars_po('tiny', 'mars_po', seeds=[0, 1], retrain=[1])
    assert {m.path for m in plan.models} == {'tiny:products', 'tiny:borrows', 'tiny:carries'}
    assert '3 make_agent' in totals(plan).to_string()


def test_equal_stages_are_one():
    one, two = plan_mars_po('smoke', 'mars_po'), plan_mars_po('smoke', 'mars_po', seeds=[0, 1])
    assert one.asked.keys() < two.asked.keys()
    assert plan_mars_po('smoke', 'mars_po', updates=4).asked.keys() != one.asked.keys()


STARTS_NOTHING = '''
import socket, sys
def refused(*args, **kwargs): raise AssertionError('a plan went to the network')
socket.socket.connect = socket.getaddrinfo = refused
from mapo.cli import main
main(['plan', 'mars_po', '--preset', sys.argv[1], '--arms', 'all', '--split', 'test', '--seeds', '0', '1'])
heavy = [m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules]
assert not heavy, f'a plan imports {heavy}'
'''


@pytest.mark.parametrize('preset', MARS_PO)
def test_nothing_is_started(preset, tmp_path):
    places = {name: str(tmp_path/name.lower()) for name in ('MAPO_RUNS', 'MAPO_CACHE', 'HOME', 'HF_HOME')}
    (tmp_path/'cwd').mkdir()
    code, output = command(sys.executable, '-B', '-c', STARTS_NOTHING, preset, cwd=tmp_path/'cwd', PYTHONPATH=str(REPO), MPLCONFIGDIR=str(tmp_path/'mpl'), HF_HUB_OFFLINE='0', **places)
    assert code == 0, output
    assert 'nothing was started' in output and 'seeds 0, 1, test split' in output
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and 'mpl' not in p.parts[len(tmp_path.parts)]]
    assert not any((tmp_path/name.lower()).exists() for name in places)


@pytest.mark.parametrize('words, said', [
    (['tiny_world'], 'tiny_world cannot be planned: only mars_po can'),
    (['mars_p'], "there is no experiment 'mars_p' (did you mean 'mars_po'?)"),
    (['mars_po', '--preset', 'huge'], "mars_po has no preset 'huge'"),
    (['mars_po', '--arms', 'mars'], "mars_po has no arm 'mars'"),
    (['mars_po', '-p', 'n_sample=3'], "mars_po has no parameter 'n_sample' (did you mean 'n_samples'?)"),
    (['mars_po', '-p', 'agents=["somebody/else-7B"]'], '`hf download somebody/else-7B config.json`'),
    (['mars_po', '-p', 'agents=["./nowhere"]'], "there is no file or folder './nowhere'"),
    (['mars_po', '-p', 'dtype=int3'], "dtype 'int3' cannot be planned"),
    (['mars_po', '--preset', 'paper', '-p', 'n_train=99999'], 'but gsm8k+math has 14973: ask for fewer'),
    (['mars_po', '-p', 'max_tokens=1000'], "model 'tiny:products' has a window of 1024 tokens: max_tokens=1000 leaves no room for a prompt of 32"),
    (['mars_po', '-p', 'source=sums'], "there is no problem source 'sums'")], ids=lambda w: ' '.join(w) if isinstance(w, list) else '')
def test_a_mistake_is_one_sentence(words, said, capsys):
    from mapo.cli import main
    with pytest.raises(SystemExit) as stopped: main(['plan', *words])
    assert stopped.value.code.startswith('mapo plan: ') and said in stopped.value.code and '\n' not in stopped.value.code
    assert capsys.readouterr().out == ''


@pytest.fixture
def local(tmp_path):
    "A model folder that holds a configuration alone."
    (tmp_path/'config.json').write_text((CHECKPOINTS/'products'/'config.json').read_text())
    return tmp_path


def test_a_configuration_is_enough(local):
    assert sizes(Model('mine', str(local))) == sizes(Model('products', 'tiny:products'))


def test_a_downloaded_configuration_is_found(local, tmp_path, monkeypatch):
    import huggingface_hub.constants
    snapshot = tmp_path/'hub'/'models--a--b'/'snapshots'/('0'*40)
    snapshot.mkdir(parents=True)
    (snapshot/'config.json').write_text((local/'config.json').read_text())
    (tmp_path/'hub'/'models--a--b'/'refs').mkdir()
    (tmp_path/'hub'/'models--a--b'/'refs'/'main').write_text('0'*40)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    assert sizes(Model('mine', 'a/b')).parameters == 236544


def test_folders_that_do_not_say_enough_are_named(local):
    said = json.loads((local/'config.json').read_text())
    mine = Model('mine', str(local))
    (local/'config.json').write_text(json.dumps(said | dict(model_type='mamba')))
    with pytest.raises(ValueError, match="model 'mine' in .*'mamba' model are counted from its weights"): sizes(mine)
    (local/'config.json').write_text(json.dumps({k: v for k, v in said.items() if k != 'num_hidden_layers'}))
    with pytest.raises(ValueError, match='its config.json has no num_hidden_layers'): sizes(mine)
    (local/'config.json').write_text(json.dumps(said))
    (local/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'a': 'model-1-of-2.safetensors'})))
    with pytest.raises(FileNotFoundError, match='has no model-1-of-2.safetensors, which its index names'): sizes(mine)
    (local/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='has no config.json'): sizes(mine)


def test_a_gguf_file_is_measured_by_its_header(tmp_path):
    import numpy as np
    from gguf import GGUFWriter
    path = tmp_path/'small.gguf'
    writer = GGUFWriter(str(path), 'llama')
    writer.add_block_count(2)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(256)
    writer.add_head_count(3)
    writer.add_context_length(512)
    writer.add_token_list(['a', 'b', 'c'])
    writer.add_tensor('token_embd.weight', np.zeros((3, 96), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = sizes(Model('small', str(path)))
    assert (size.parameters, size.layers, size.kv_heads, size.head_dim, size.vocabulary, size.window) == (288, 2, 3, 32, 3, 512)


def test_names_that_others_chose_are_escaped(local):
    hostile = local/'<script>alert(1)'
    hostile.mkdir()
    (hostile/'config.json').write_text((local/'config.json').read_text())
    plan = plan_mars_po('smoke', 'mars_po', agents=[str(hostile)])
    assert '<script>' not in plan._repr_html_() and '<script>alert(1)' in repr(plan)
