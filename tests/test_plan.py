"A plan counts what a run does, knows models without loading them, and starts nothing."
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import fields, replace

import pandas as pd
import pytest

import test_malt
import test_mars_po
import test_multiagent_ft
from conftest import REPO, command
from mapo.agents import CHECKPOINTS, Model, model_folder
from mapo.experiment import compute, experiment
from mapo.malt import MALT
from mapo.mars_po import MARS_PO
from mapo.methods import LICENCES
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.plan import (CONDITIONS, CONFIGS, GPUS, PAPERS, USABLE, Answering,
                       Learning, Machine, Reading, Sizes, check_fit, count_parameters, fits, here, kept_bytes,
                       licence_lines, lora_parameters, machine, machine_table, machine_totals, plan_paper,
                       sampling_table, shortages, sizes, teachers, totals, training_memory)
from mapo.runs import Run

ARMS = dict(
    # stages that both ask for, examples and pairs, flipped labels, reward models that are trained
    mars_po='sft_own,mars_po_flipped',
    multiagent_ft='debate_dpo', # summaries, critics' lessons, judged pairs, likelihoods and divergences
    malt='malt_shuffled,debate') # trees, SFT and DPO, chains, critiques of other problems, a debate
PRESETS = {e.name: e.presets for e in (MARS_PO, MULTIAGENT_FT, MALT)}


def real(name, runs, **settings):
    "A real run of the smallest preset, as small as the tests of its paper have it, and the plan of the same."
    run = Run('planned', dict(name=name, arms=ARMS[name]), root=runs)
    e = PAPERS[name]
    s = e.settings('smoke', **settings)
    e.beyond(run, s, compute(run, e, s, ARMS[name], [0], 'dev'))
    return run, plan_paper(name, 'smoke', ARMS[name], **settings)


def of(name): return pytest.mark.xdist_group(name) # beside the tests of the paper, whose stages it reuses


@pytest.fixture(scope='module')
def ran(runs): return real('mars_po', runs, **test_mars_po.SMALL, checkpoint_every=2)


@pytest.fixture(scope='module', params=[pytest.param((name, small), id=name, marks=of(name)) for name,
                                        small in (('multiagent_ft', test_multiagent_ft.SMALL),
                                                  ('malt', test_malt.SMALL))])
def talked(request, runs): return real(request.param[0], runs, **request.param[1])


def artifacts(run, kind):
    return [p for p in sorted({run.artifacts/f"{s['stage']}-{s['key'][:16]}" for s in run.stages})
            if p.name.startswith(kind)]


@pytest.mark.slow
@of('mars_po')
def test_stages_are_those_of_a_run(ran):
    run, plan = ran
    assert Counter(s['stage'] for s in run.stages) == sum((Counter({p.stage: plan.asked[p.key]})
                                                           for p in plan.planned.values()), Counter())
    assert Counter(p.name.rsplit('-', 1)[0]
                   for p in artifacts(run, '')) == Counter(p.stage for p in plan.planned.values())


@pytest.mark.parametrize('name', PAPERS)
def test_stages_are_those_of_the_experiment(name, monkeypatch):
    "A plan asks for what the experiment asks for, up to its record."
    monkeypatch.setattr('mapo.experiment.write_record', lambda *_: None)
    plan,e = plan_paper(name, 'smoke', 'all', seeds=[0, 1]),PAPERS[name]
    run = type(plan)('the same', plan.prompt_tokens)
    experiment(run, e, e.settings('smoke'), 'all', [0, 1], 'dev')
    assert run.asked == plan.asked


@pytest.mark.slow
def test_conversations_are_those_of_a_run(talked):
    run, plan = talked
    made = Counter(s['stage'] for s in run.stages)
    planned = sum((Counter({p.stage: plan.asked[p.key]}) for p in plan.planned.values()), Counter())
    assert {k: n for k, n in made.items() if k != 'train'} == {k: n for k, n in planned.items() if k != 'train'}
    table = plan.table.query("kind == 'sample'")
    for stage in ('sample_alone', 'debate', 'sample_tree'):
        found = [pd.read_parquet(p/'turns.parquet') for p in artifacts(run, f'{stage}-')]
        said = table[table.stage == stage]
        assert sum(map(len, found)) == said.answers.sum()
        assert sum(t.completion_tokens.sum() for t in found) <= said.tokens.sum()
        assert sum(t.prompt_tokens.sum() for t in found) <= said.prompts.sum()
    for stage in ('judge_pairs', 'tell_refiner'): # at most
        found = [pd.read_parquet(p/'turns.parquet') for p in artifacts(run, f'{stage}-')]
        said = table[table.stage == stage]
        assert sum(len(t[t['round'] == t['round'].max()]) for t in found if len(t)) <= said.answers.sum()
        assert sum(t[t['round'] == t['round'].max()].prompt_tokens.sum() for t in found if len(t)) <= said.prompts.sum()


@pytest.mark.slow
def test_lessons_are_those_of_a_run(talked):
    run, plan = talked
    logs = [json.loads((p/'log.json').read_text()) for p in artifacts(run, 'train-')]
    planned = plan.table.query("kind == 'tune'")
    # a model that finds nothing to learn is not trained
    assert planned.updates.sum() >= sum(l['updates'] for l in logs) > 0
    assert len(planned) >= len(logs)
    assert sum(l['tokens_trained'] for l in logs) <= planned.tokens.sum()


@pytest.mark.slow
@of('mars_po')
def test_answers_are_those_of_a_run(ran):
    run, plan = ran
    turns = pd.concat([pd.read_parquet(p/'turns.parquet') for p in artifacts(run, 'sample_')])
    found = turns.groupby(['purpose', 'iteration']).size()
    planned = sampling_table(plan)
    assert found.to_dict() == planned.set_index(['purpose', 'iteration']).answers.to_dict()
    assert planned.requests.sum() == turns.groupby(['purpose', 'iteration', 'context_id', 'model_key', 'agent',
                                                    'split']).ngroups
    assert turns.completion_tokens.sum() <= planned.tokens.sum()
    assert turns.prompt_tokens.max() <= plan.prompt_tokens
    scores = [pd.read_parquet(p/'table.parquet') for p in artifacts(run, 'reward-')]
    assert plan.table[plan.table.stage == 'reward'].answers.sum() == sum(map(len, scores))


@pytest.mark.slow
@of('mars_po')
def test_trainings_are_those_of_a_run(ran):
    run, plan = ran
    kind = lambda p: json.loads((p/'manifest.json').read_text())['spec']['inputs']['objective']['type']
    logs = [json.loads((p/'log.json').read_text()) | dict(stage=f'train {kind(p)}') for p in artifacts(run, 'train-')]
    planned = plan.table[plan.table.stage.str.startswith('train')]
    assert planned.groupby('stage').updates.sum().to_dict() == {
        name: sum(l['updates'] for l in logs if l['stage'] == name) for name in {l['stage'] for l in logs}}
    assert sum(l['tokens_trained'] for l in logs) <= planned.tokens.sum()
    stored = sum((p/'model'/'model.safetensors').stat().st_size for p in artifacts(run, 'train-'))
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
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    reward, kind = 'architectures' in CONFIGS[path], CONFIGS[path]['model_type']
    config = AutoConfig.for_model(kind, **{k: v for k, v in CONFIGS[path].items()
                                           if k not in ('model_type', 'architectures')})
    with torch.device('meta'):
        net = (AutoModel if reward else AutoModelForCausalLM).from_config(config)
        head = [torch.nn.Linear(8192, 8192), torch.nn.Linear(8192, 1)] if reward else []
    assert sum(p.numel() for part in (net, *head) for p in part.parameters()) == count_parameters(CONFIGS[path])


@pytest.mark.parametrize('path, billions',
                         [('microsoft/Phi-3-mini-128k-instruct', 3.82), ('mistralai/Mistral-7B-Instruct-v0.2', 7.24),
                          ('meta-llama/Meta-Llama-3-8B', 8.03),
                                            ('Qwen/Qwen2.5-1.5B', 1.54), ('Qwen/Qwen2.5-0.5B-Instruct', .49),
                          ('deepseek-ai/deepseek-math-7b-rl', 6.91)])
def test_parameters_are_those_that_are_published(path, billions):
    assert round(count_parameters(CONFIGS[path])/1e9, 2) == billions


def test_adapter_parameters_are_those_that_peft_makes():
    from mapo.engines import load_model
    from peft import LoraConfig, get_peft_model
    model = Model('products', 'tiny:products')
    net = get_peft_model(load_model(model, 'cpu')[0],
                         LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == lora_parameters(sizes(model), 4)


@pytest.mark.parametrize('heads, kv_heads, intermediate', [(4, 4, 512), (8, 2, 512), (4, 1, 1024)])
def test_activations_are_what_autograd_keeps(heads, kv_heads, intermediate):
    "Bytes per token and layer: the difference of six and two layers, and of 128 and 64 tokens, in bfloat16 autocast."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    def kept(layers, tokens):
        net, found = LlamaForCausalLM(LlamaConfig(hidden_size=64*heads, intermediate_size=intermediate,
                                                  num_hidden_layers=layers, num_attention_heads=heads,
                                                  num_key_value_heads=kv_heads, vocab_size=99,
                                                  attn_implementation='sdpa')), {}
        add_fused_lm_head(net)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        def keep(t):
            storage = t.untyped_storage()
            # held, so that no address is used twice
            if storage.data_ptr() not in weights: found[storage.data_ptr()] = storage.nbytes(), t
            return t
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16):
            net(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True)
        return sum(n for n, _ in found.values())

    measured = (kept(6, 128) - kept(2, 128) - kept(6, 64) + kept(2, 64))/4/64
    one = Sizes(parameters=0, layers=1, hidden=64*heads, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
                head_dim=64, vocabulary=99, window=0)
    assert measured == pytest.approx(training_memory(one, 'bfloat16', 1)[1], rel=.01)


def test_settings_that_a_machine_may_be_told_are_those_of_training():
    from mapo.objectives import Objective
    known = {f.name for f in fields(Objective)}
    for name in ('batch_size', 'micro_batch_size', 'updates', 'lora_rank',
                 *{'quantized', 'gradient_checkpointing'} & known):
        assert name in {f.name for f in fields(Learning)}


def test_the_presets_models_and_licences_are_known():
    used = {m for s in MARS_PO.presets.values() for m in (*s.agents, *s.same_agents, s.reward_model, s.reward_init)}
    used |= {s.model for s in MULTIAGENT_FT.presets.values()} | {m for s in MALT.presets.values()
                                                                 for m in (s.generator, s.verifier, s.refiner)}
    used = {m for m in used if m and not m.startswith('tiny:')}
    assert used <= CONFIGS.keys() and used <= LICENCES.keys()
    assert set(LICENCES.values()) <= CONDITIONS.keys()


def test_who_learns_from_whom():
    paper = plan_paper('mars_po', 'paper', 'mars_po')
    known = teachers(paper)
    learners = known['texts', 'Llama 3.1 licence', 'Llama-3.1-8B-Instruct']
    assert learners == ['Qwen2.5-Math-7B-Instruct', 'deepseek-math-7b-rl']
    assert len(known['scores', 'Qwen licence', 'Qwen2.5-Math-RM-72B']) == 3
    line = 'Texts of Llama-3.1-8B-Instruct train Qwen2.5-Math-7B-Instruct, deepseek-math-7b-rl: Llama 3.1 licence.'
    assert line in licence_lines(paper)
    alone = teachers(plan_paper('mars_po', 'paper', 'dpo_nll', reward_model='', order='drawn'))
    assert alone == {} # own answers alone


def test_roles_of_several_families_learn_to_answer_each_other():
    plan = plan_paper('malt', 'paper', 'malt', verifier='mistralai/Mistral-7B-Instruct-v0.2')
    known = teachers(plan)
    assert known['prompts', 'Llama 3.1 licence', 'Llama-3.1-8B-Instruct'] == ['Mistral-7B-Instruct-v0.2']
    assert known['prompts', 'Apache-2.0', 'Mistral-7B-Instruct-v0.2'] == ['Llama-3.1-8B-Instruct']
    assert not [what for what, *_ in known if what == 'texts']
    line = 'Texts of Llama-3.1-8B-Instruct are in the prompts that train Mistral-7B-Instruct-v0.2: Llama 3.1 licence.'
    assert line in licence_lines(plan)
    assert teachers(plan_paper('multiagent_ft', 'paper', 'debate_dpo')) == {} # one model everywhere


def test_an_adapter_is_kept_instead_of_weights():
    full, adapter = (plan_paper('mars_po', 'paper', 'mars_po', lora_rank=rank) for rank in (0, 16))
    assert adapter.table.disk.sum() < full.table.disk.sum()/100
    assert len(adapter.asked) == len(full.asked)


def test_agents_trained_from_scratch_are_followed_to_their_sizes():
    plan = plan_paper('mars_po', 'tiny', 'mars_po', seeds=[0, 1], retrain=[1])
    assert {m.path for m in plan.models} == {'tiny:products', 'tiny:borrows', 'tiny:carries'}
    assert '3 make_agent' in totals(plan).to_string()


def test_equal_stages_are_one():
    one, two = plan_paper('mars_po', 'smoke', 'mars_po'), plan_paper('mars_po', 'smoke', 'mars_po', seeds=[0, 1])
    assert one.asked.keys() < two.asked.keys()
    assert plan_paper('mars_po', 'smoke', 'mars_po', updates=4).asked.keys() != one.asked.keys()


STARTS_NOTHING = '''
import socket, sys
def refused(*args, **kwargs): raise AssertionError('a plan went to the network')
socket.socket.connect = socket.getaddrinfo = refused
from mapo.cli import main
name, *presets = sys.argv[1:]
for preset in presets:
    more = [] if preset.startswith('paper') else ['--machine', '8xH100-80']
    main(['plan', name, '--preset', preset, '--arms', 'all', '--split', 'test', '--seeds', '0', '1', *more])
heavy = [m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules]
assert not heavy, f'a plan imports {heavy}'
'''


@pytest.mark.parametrize('name', PRESETS)
def test_nothing_is_started(name, tmp_path):
    places = {place: str(tmp_path/place.lower()) for place in ('MAPO_RUNS', 'MAPO_CACHE', 'HOME', 'HF_HOME')}
    (tmp_path/'cwd').mkdir()
    code, output = command(sys.executable, '-B', '-c', STARTS_NOTHING, name, *PRESETS[name], cwd=tmp_path/'cwd',
                           PYTHONPATH=str(REPO), MPLCONFIGDIR=str(tmp_path/'mpl'), HF_HUB_OFFLINE='0', **places)
    assert code == 0, output
    assert all(f'{name}, preset {preset}, arms all, seeds 0, 1, test split: a plan; nothing was started.' in output
               for preset in PRESETS[name])
    assert output.count('Sums on 8xH100-80') == sum(not preset.startswith('paper') for preset in PRESETS[name])
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and 'mpl' not in p.parts[len(tmp_path.parts)]]
    assert not any((tmp_path/place.lower()).exists() for place in places)


@pytest.mark.parametrize('words, said', [
    (['tiny_world'], 'tiny_world cannot be planned: mars_po, multiagent_ft, malt can'),
    (['malt_rates'], 'malt_rates cannot be planned: mars_po, multiagent_ft, malt can'),
    (['mars_p'], "there is no experiment 'mars_p' (did you mean 'mars_po'?)"),
    (['mars_po', '--preset', 'huge'], "mars_po has no preset 'huge'"),
    (['malt', '--preset', 'huge'], "malt has no preset 'huge'"),
    (['mars_po', '--arms', 'mars'], "mars_po has no arm 'mars'"),
    (['multiagent_ft', '--arms', 'star,moon'], "multiagent_ft has no arm 'moon'"),
    (['mars_po', '-p', 'n_sample=3'], "mars_po has no parameter 'n_sample' (did you mean 'n_samples'?)"),
    (['mars_po', '-p', 'agents=["somebody/else-7B"]'], '`hf download somebody/else-7B config.json`'),
    (['mars_po', '-p', 'agents=["./nowhere"]'], "there is no file or folder './nowhere'"),
    (['mars_po', '-p', 'dtype=int3'], "dtype 'int3' cannot be planned"),
    (['mars_po', '--preset', 'paper', '-p', 'n_train=99999'], 'but gsm8k+math has 14973: ask for fewer'),
    (['multiagent_ft', '--preset', 'paper', '-p', 'n_train=4000'],
     '4200 train problems were asked for, but math:1-3 has 3504'),
    (['multiagent_ft', '--preset', 'paper', '-p', 'source=math:6'], "no problem source 'math:6'"),
    (['mars_po', '-p', 'max_tokens=1000'],
     "model 'tiny:products' has a window of 1024 tokens: max_tokens=1000 leaves no room for a prompt of 32"),
    (['malt', '-p', 'max_tokens=1000'], "model 'tiny:base' has a window of 1024 tokens"),
    (['mars_po', '-p', 'source=sums'], "there is no problem source 'sums'"),
    (['mars_po', '--machine', '0xH100-80'], "a machine has at least 1 GPU, not '0', as '0xH100-80' says"),
    (['mars_po', '--machine', '8xH1000'], "there is no machine '8xH1000' (did you mean '8xH100-80'?)"),
    (['mars_po', '--machine=-1xA100-80'], "a machine has at least 1 GPU, not '-1'"),
    (['mars_po', '--machine', '8.5xA100-80'], "a machine has at least 1 GPU, not '8.5'"),
    (['mars_po', '--machine', '٣xA100-80'], 'a machine has at least 1 GPU'),
    (['mars_po', '--machine', 'x'], "there is no machine 'x'"),
    (['mars_po', '--machine', '8xH100-80', '--machine', 'L40S-48'],
     '--machine names one machine, not 8xH100-80 and L40S-48'),
    (['mars_po', '--answer-tokens', '-1'], 'answer_tokens is a number of tokens, not -1'),
    (['malt', '--preset', 'paper', '-p', 'lora_rank=0', '--machine', 'A100-80'],
     'malt, preset paper, arms core, seeds 0, dev split does not fit on A100-80. train SFT with '
     'Llama-3.1-8B-Instruct: '),
], ids=lambda w: ' '.join(w) if isinstance(w, list) else '')
def test_a_mistake_is_one_sentence(words, said, capsys):
    from mapo.cli import main
    with pytest.raises(SystemExit) as stopped: main(['plan', *words])
    assert stopped.value.code.startswith('mapo plan: ') and said in stopped.value.code
    assert '\n' not in stopped.value.code
    assert capsys.readouterr().out == ''


def test_a_machine_given_as_nothing_is_told_apart_from_none(capsys):
    from mapo.cli import main
    main(['plan', 'mars_po', '--preset', 'smoke'])
    assert 'Sums on' not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no machine ''"):
        main(['plan', 'mars_po', '--preset', 'smoke', '--machine', ''])


LLAMA = sizes(Model('llama', 'meta-llama/Llama-3.1-8B-Instruct'))
ONE = Machine('A', 1, 80e9, 1e15, 4e12)


def test_a_text_written_alone_waits_for_the_weights():
    "16.06 GB of weights and some keys and values at 2.4 TB/s, a token at a time."
    work = Answering(LLAMA, 'bfloat16', requests=1, answers=1, prompt=1, answer=1000, width=1001)
    step = (16_060_522_496 + 501*131072)/(.6*4e12) + .003
    assert work.seconds(ONE) == pytest.approx(60 + 16_060_522_496/2e9 + 1000*step, rel=1e-3)


def test_many_texts_written_together_are_as_fast_as_they_are_computed():
    work = Answering(LLAMA, 'bfloat16', requests=1, answers=1000, prompt=1, answer=100, width=101, chunk=1000)
    on = replace(ONE, bandwidth=1e15) # memory that is never waited for
    assert work.rows(on) == 1000
    assert work.seconds(on) - work.opening(on) == pytest.approx(
        100*(1000*(2*8_030_261_248 + 4*32*4096*51)/.5e15 + .003), rel=1e-3)


def test_copies_and_shares_divide_the_time():
    work = Answering(LLAMA, 'bfloat16', requests=4096, answers=4096, prompt=256, answer=256, width=512, chunk=4096)
    four, one = replace(ONE, gpus=4), work.seconds(ONE) - work.opening(ONE)
    copies, shares = (replace(work, **{how: 4}) for how in ('data_parallel', 'tensor_parallel'))
    assert one/4 <= copies.seconds(four) - copies.opening(four) < 1.05*one/4
    # what vLLM takes to arrange a step is not divided
    assert one/4 < shares.seconds(four) - shares.opening(four) < one/2
    assert sum(shares.memory(four)[:1]) == pytest.approx(16_060_522_496/4)
    assert copies.gpus == shares.gpus == 4


def test_an_engine_of_transformers_has_one_batch_of_its_budget():
    work = Answering(LLAMA, 'bfloat16', engine='transformers', requests=100, answers=1000, prompt=256, answer=256,
                     most=256, width=512, token_budget=8192)
    assert work.rows(ONE) == 16
    held = work.memory(ONE)
    # reading prompts takes more than drawing tokens
    assert (held.weights, held.cache, held.activations) == (16_060_522_496, 16*512*131072, 2*16*256*(3*14336 + 5*4096))
    assert work.wrong(ONE) == ''
    assert 'needs the engine vllm' in replace(work, tensor_parallel=2).wrong(replace(ONE, gpus=2))


@pytest.mark.parametrize('path, able', [('Qwen/Qwen2.5-Math-7B-Instruct', {1, 2, 4}),
                                        ('deepseek-ai/deepseek-math-7b-rl', {1, 2, 4, 8}),
                                        ('meta-llama/Llama-3.1-8B-Instruct', {1, 2, 4, 8}),
                                        ('Qwen/Qwen2.5-Math-RM-72B', {1, 2, 4, 8}),
                                        ('HuggingFaceTB/SmolLM2-135M-Instruct', {1, 3}),
                                        ('Qwen/Qwen2.5-1.5B', {1, 2, 4, 6})])
def test_heads_are_shared_out_evenly(path, able):
    size = sizes(Model('', path))
    assert {t for t in range(1, 9) if not Answering(size, tensor_parallel=t).wrong(machine('8xH100-80'))} == able


def test_training_memory_of_a_launch_is_counted_by_hand():
    eight, work = machine('8xH100-80'), Learning(LLAMA, 'bfloat16', 10, 16, 1, 2, 100, 1000)
    P, rows = 8_030_261_248, kept_bytes(LLAMA, 2000)
    assert sum(work.memory(eight)) == 18*P + rows == sum(training_memory(LLAMA, 'bfloat16', 2000))
    assert sum(replace(work, launch='ddp', processes=8).memory(eight)) == 22*P + rows # gradients twice, no share
    assert sum(replace(work, launch='zero3', processes=8).memory(eight)) == 16*P/8 + 4*128256*4096 + rows
    adapter = lora_parameters(LLAMA, 16)
    assert sum(replace(work, lora_rank=16).memory(eight)) == 18*adapter + 2*P + rows
    assert replace(work, micro_batch_size=0, launch='fsdp', processes=8).rows == 2
    assert replace(work, gradient_checkpointing=True).memory(eight).activations < rows/10


def test_training_time_is_counted_by_hand():
    work = Learning(LLAMA, 'bfloat16', 10, 16, 1, 2, 1000, 1000, reference=500)
    flops = 2*8_030_261_248 + 4*32*4096*500
    start = 2*(60 + 2*8_030_261_248/2e9)
    assert work.seconds(ONE) == pytest.approx(start + 10*16*2000*3*flops/.35e15 + 500*1000*flops/.5e15)
    four = replace(work, launch='fsdp', processes=4).seconds(ONE)
    # the reference reads on one GPU
    assert four == pytest.approx(start + 10*16*2000*3*flops/.35e15/4 + 500*1000*flops/.5e15)


def test_what_is_refused_names_the_shortage_and_what_would_help():
    plan = plan_paper('mars_po', 'paper')
    found = {s.stage: s for s in shortages(plan, machine('8xH100-80'))}
    assert found['reward'].change == dict(tensor_parallel=4) and found['reward'].model == 'Qwen2.5-Math-RM-72B'
    assert found['train DPO'].change == dict(launch='fsdp', processes=2) and found['train DPO'].others == 2
    need, over = map(float, re.search(r'([\d.]+) GB a GPU, ([\d.]+) GB more than the 72.0 GB',
                                      found['train DPO'].text).groups())
    assert need - over == pytest.approx(72, abs=1) # three digits each
    with pytest.raises(ValueError, match='Everything fits with -p tensor_parallel=4 -p launch=fsdp -p processes=2$'):
        check_fit(plan, machine('8xH100-80'))
    # 28 heads, 8 GPUs
    with pytest.raises(ValueError, match='Together these do not fit every stage'): check_fit(plan, machine('8xA100-40'))


def test_what_would_help_does():
    "Every change that is named makes its stage fit; and no smaller one of the same kind would."
    for name, preset in (('mars_po', 'paper'), ('multiagent_ft', 'paper_llama'), ('malt', 'paper')):
        plan = plan_paper(name, preset, arms='all')
        for gpu in ('8xH100-80', '4xA100-40', 'RTX4090-24'):
            for short in shortages(plan, on := machine(gpu)):
                works = [row['work'] for row in plan._rows if row['stage'] == short.stage]
                worst = max(works, key=lambda work: sum(work.memory(on)))
                assert not fits(worst, on)
                if short.change:
                    assert fits(replace(worst, **short.change), on)
                    for number in ('processes', 'tensor_parallel'):
                        if short.change.get(number, 2) > 2:
                            assert not fits(replace(worst, **short.change | {number: short.change[number]//2}), on)
                elif 'larger GPU' in short.text:
                    assert fits(worst, replace(on, memory=GPUS[short.text.split(': ')[-1]][0]))


def test_a_reward_model_is_given_no_adapter():
    work = Learning(LLAMA, 'float32', 10, 16, 1, 2, 100, 1000, adaptable=False)
    assert not [c for c in work.changes(machine('H100-80')) if 'lora_rank' in c or 'quantized' in c]
    assert {'launch': 'fsdp', 'processes': 8} in work.changes(machine('8xH100-80'))
    assert 'launch=ddp' in Learning(LLAMA, lora_rank=8, quantized=True, launch='fsdp', processes=2,
                                    batch_size=2).wrong(machine('8xH100-80'))


@pytest.mark.parametrize('wrong, said', [(dict(launch='fsdp', processes=16),
                                          'it asks for 16 GPUs (launch=fsdp, processes=16), and the machine has 8'),
                                         (dict(launch='ddp', processes=8, micro_batch_size=4),
                                          'its 16 rows per update cannot be shared '
                                          'by processes=8 that compute 4 at once')])
def test_a_launch_that_cannot_be_is_refused(wrong, said):
    assert Learning(LLAMA, batch_size=16, **wrong).wrong(machine('8xH100-80')) == said


def test_a_machine_adds_up():
    plan = plan_paper('malt', 'paper', on='8xH100-80', answer_tokens=350)
    table, sums = machine_table(plan, plan.machine), machine_totals(plan, plan.machine).set_index('total').value
    assert table.hours.sum() == pytest.approx(sum(row['work'].seconds(plan.machine) for row in plan._rows)/3600)
    assert sums['time'] == f'{table.hours.sum():,.3g} hours'
    assert float(sums['GPU-hours that are paid for'].replace(',', '')) == pytest.approx(8*table.hours.sum(), rel=.01)
    assert table.stages.sum() == len({row['key'] for row in plan._rows})
    assert (table.GB <= 72).all()
    assert plan_paper('malt', 'paper', on='8xH100-80').table.tokens.sum() > 1.5*plan.table.tokens.sum()


def test_this_machine_is_measured():
    found = here()
    assert found.gpus == 1 and found.engine == 'transformers' and 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    plan = plan_paper('mars_po', 'smoke', on='here')
    assert 'Measured here' in repr(plan) and 'GPU-hours' not in repr(plan)
    work = Learning(LLAMA, 'float32', 1, 1, 1, 1, 100, 100) # what was measured is reached
    assert work.seconds(found) == pytest.approx(.1 + 4*8_030_261_248/2e9
                                                + 3*100*(2*8_030_261_248 + 4*32*4096*50)/found.flops)


def test_a_reader_of_long_conversations_is_given_room():
    work = Reading(LLAMA, 'bfloat16', texts=10, length=5000, longest=100_000, engine='transformers', token_budget=4096)
    assert work.memory(ONE).activations == 2*100_000*(3*14336 + 5*4096)
    assert USABLE < 1


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
    assert (size.parameters, size.layers, size.kv_heads, size.head_dim, size.vocabulary,
            size.window) == (288, 2, 3, 32, 3, 512)


def test_names_that_others_chose_are_escaped(local):
    hostile = local/'<script>alert(1)'
    hostile.mkdir()
    (hostile/'config.json').write_text((local/'config.json').read_text())
    plan = plan_paper('mars_po', 'smoke', 'mars_po', agents=[str(hostile)], on='H100-80')
    assert '<script>' not in plan._repr_html_() and '<script>alert(1)' in repr(plan)


@pytest.mark.parametrize('name, models', [('mars_po', ['agents']), ('multiagent_ft', ['model']),
                                          ('malt', ['generator', 'verifier', 'refiner'])])
def test_a_model_that_cannot_learn_what_it_says_is_refused_before_anything_is_sampled(name, models, tmp_path):
    folder = shutil.copytree(model_folder(Model('base', 'tiny:base')), tmp_path/'model')
    template = (folder/'chat_template.jinja').read_text()
    said = "message['content'] }}"
    assert said in template
    louder = template.replace(said, "(message['content'] + '!' if message['role'] == 'assistant' else "
                                    "message['content']) }}")
    (folder/'chat_template.jinja').write_text(louder)
    given = {key: [str(folder)]*3 if key == 'agents' else str(folder) for key in models}
    e,run = PAPERS[name],Run(name, {}, root=tmp_path/'runs')
    refused = r"cannot play the role 'generator' .*cannot be trained with: it turns the answer '.*' into '.*!'"
    for start in (lambda: experiment(run, e, e.settings('smoke', **given), 'core', [0], 'dev'),
                  lambda: plan_paper(name, 'smoke', **given)):
        with pytest.raises(ValueError, match=refused): start()
    assert not run.stages
