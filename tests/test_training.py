"""What notebook 07 cannot show: parity with TRL and the formula, references over iterations, kill -9, hostile files."""
import json, math, os, pickle, re, subprocess, sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from mapo import training
from mapo.agents import Model
from mapo.engines import RewardScorer, load_model, load_reward_model, new_reward_model, save_model
from mapo.training import (DPO, SFT, PairTrainer, Reward, check_template, example_tokens, log_probabilities,
                           pair_tokens, reference_log_probabilities, reward_tokens, template_faults, train)
from warm import Warm

PLAIN = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<bot>{{ m['content'] }}{{ eos_token }}"
         "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}")
CHATML = ("{% for m in messages %}<im>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt "
          "%}<im>assistant\n{% endif %}")


def tokenizer(template=PLAIN, **special):
    tokens = ['<pad>', '<s>', '</s>', '<user>', '<bot>', '<im>', '\n', *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token='?'))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r'.|\n'), 'isolated'), decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=['<user>', '<bot>', '<im>'],
                                   **(dict(pad_token='<pad>', bos_token='<s>', eos_token='</s>') | special))
    made.chat_template = template
    return made


def random_model(folder, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=102, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=1, num_key_value_heads=1,
                         max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0)
    save_model(LlamaForCausalLM(config), tokenizer(), folder)
    return Model(f'random{seed}', str(folder))


def says(text, role='assistant'): return [{'role': role, 'content': text}]


def make_pairs(n, seed=0):
    "Pairs of very unequal lengths."
    rng = np.random.default_rng(seed)
    word = lambda longest: ''.join(rng.choice(list('abc 123'), rng.integers(0, longest)))
    return pd.DataFrame([dict(prompt=says(f'{i}+{word(9)}=', 'user'), chosen=says(word(120 if i % 3 else 4)),
                              rejected=says('x'+word(30))) for i in range(n)])


@pytest.fixture(scope='module')
def initial(tmp_path_factory): return random_model(tmp_path_factory.mktemp('models')/'initial')


@pytest.fixture(scope='module')
def other(tmp_path_factory): return random_model(tmp_path_factory.mktemp('models')/'other', seed=1)


def irpo(initial, reference, pairs, beta, alpha):
    "IRPO's loss of all pairs, by hand: one sequence at a time, from the plain logits."
    nets,losses,nlls = [load_model(m, 'cpu')[0] for m in (initial, reference)],[],[]
    tokens,_ = pair_tokens(tokenizer(), pairs)
    def logp(net, context, answer):
        with torch.no_grad(): scores = net(torch.tensor([context+answer])).logits[0].double().log_softmax(-1)
        return sum(float(scores[len(context)+i-1, t]) for i, t in enumerate(answer))
    for r in tokens.itertuples():
        ratio = [logp(nets[0], r.prompt_ids, a)-logp(nets[1], r.prompt_ids, a) for a in (r.chosen_ids, r.rejected_ids)]
        nlls.append(-logp(nets[0], r.prompt_ids, r.chosen_ids)/len(r.chosen_ids))
        losses.append(math.log1p(math.exp(-beta*(ratio[0]-ratio[1]))) + alpha*nlls[-1])
    return np.mean(losses),np.mean(nlls)


@pytest.mark.parametrize('batch,micro', [(1, 1), (2, 2), (4, 4), (4, 1), (4, 2)])
@pytest.mark.parametrize('cached', [True, False])
def test_loss_is_irpos_formula(initial, other, tmp_path, batch, micro, cached):
    pairs,settings = make_pairs(batch, seed=batch),DPO(updates=1, batch_size=batch, micro_batch_size=micro, alpha=0.7,
                                                       beta=0.3)
    reference = reference_log_probabilities(other, pairs, settings) if cached else other
    first = train(initial, pairs, settings, tmp_path/'out', reference).log.iloc[0]
    loss,nll = irpo(initial, other, pairs, 0.3, 0.7)
    assert abs(first.loss-loss) < 1e-5 and abs(first.nll-nll) < 1e-5


def trl(kind, config, net, rows, folder, reference=None, **extra):
    args = config(output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none',
                  disable_tqdm=True, save_strategy='no', logging_steps=1,
                  train_sampling_strategy='sequential', per_device_train_batch_size=4, max_steps=3, learning_rate=1e-3,
                  **extra)
    more = dict(ref_model=reference) if reference is not None else {}
    trainer = kind(net, args=args, train_dataset=datasets.Dataset.from_pandas(rows), processing_class=tokenizer(),
                   **more)
    trainer.train()
    return trainer


def in_order(rows, settings):
    return rows.iloc[training.row_order(len(rows), settings.updates*settings.batch_size,
                                        settings.seed)].reset_index(drop=True)


def test_without_alpha_it_is_trls_dpo(initial, other, tmp_path):
    pairs,settings = make_pairs(7),DPO(updates=3, batch_size=4, learning_rate=1e-3)
    ours = train(initial, pairs, settings, tmp_path/'ours', other)
    theirs = trl(DPOTrainer, DPOConfig, load_model(initial, 'cpu')[0], in_order(pairs, settings), tmp_path/'theirs',
                 load_model(other, 'cpu')[0])
    assert ours.log.loss.tolist() == [h['loss'] for h in theirs.state.log_history if 'loss' in h]
    trained = load_model(ours.model, 'cpu')[0].state_dict()
    assert all(torch.equal(trained[k], v) for k, v in theirs.model.state_dict().items() if k in trained)


def test_sft_is_trls(initial, tmp_path):
    examples = make_pairs(7).rename(columns={'chosen': 'completion'})[['prompt', 'completion']]
    settings = SFT(updates=3, batch_size=4, learning_rate=1e-3)
    ours = train(initial, examples, settings, tmp_path/'ours')
    theirs = trl(SFTTrainer, SFTConfig, load_model(initial, 'cpu')[0], in_order(examples, settings), tmp_path/'theirs')
    assert ours.log.loss.tolist() == [h['loss'] for h in theirs.state.log_history if 'loss' in h]
    cut = train(initial, examples, replace(settings, micro_batch_size=1), tmp_path/'cut')
    assert np.allclose(ours.log.loss, cut.log.loss, atol=1e-5)


@pytest.mark.parametrize('rank', [0, 4])
@pytest.mark.parametrize('cached', [True, False])
def test_reference_over_iterations(initial, tmp_path, rank, cached):
    "With reference=previous the log-ratios start at zero; with reference=initial, at iteration 2, they do not."
    pairs,settings = make_pairs(8),DPO(updates=4, batch_size=8, lora_rank=rank, learning_rate=1e-2, alpha=1.)
    given = lambda model: reference_log_probabilities(model, pairs, settings) if cached else model
    previous = train(initial, pairs, settings, tmp_path/'1', given(initial)).model
    assert bool(previous.adapter) == bool(rank)
    held = lambda model, name: train(previous, pairs, settings, tmp_path/name, given(model)).log.iloc[0]
    same,far = held(previous, 'same'),held(initial, 'far')
    assert abs(same.chosen_reward) < settings.beta*1e-6 and abs(same.rejected_reward) < settings.beta*1e-6
    assert abs(far.chosen_reward) > 0.05 and abs(far.margin) > 0.05


def test_adapter_goes_on_from_itself(initial, tmp_path):
    pairs,settings = make_pairs(4),DPO(updates=3, batch_size=4, lora_rank=4, learning_rate=1e-2)
    table = reference_log_probabilities(initial, pairs, settings)
    one = train(initial, pairs, settings, tmp_path/'1', table)
    assert sorted(p.name
                  for p in (tmp_path/'1').glob('*adapter*')) == ['adapter_config.json', 'adapter_model.safetensors']
    assert json.loads((tmp_path/'1'/'adapter_config.json').read_text())['base_model_name_or_path'] == initial.path
    two = train(one.model, pairs, settings, tmp_path/'2', table)
    tokens,_ = pair_tokens(tokenizer(), pairs)
    now = log_probabilities(load_model(one.model, 'cpu')[0], list(tokens.prompt_ids), list(tokens.chosen_ids)).mean()
    assert abs(two.log.chosen_logp[0]-now) < 1e-3
    assert two.model.path == initial.path and two.model.adapter == str(tmp_path/'2')
    with pytest.raises(ValueError, match='rank 4, but the settings ask for 8'):
        train(one.model, pairs, replace(settings, lora_rank=8), tmp_path/'3', table)


def test_reference_table_fits_rows_not_positions(initial, other, tmp_path):
    pairs,settings = make_pairs(6),DPO(updates=1, batch_size=6)
    table = reference_log_probabilities(other, pairs, settings)
    first = train(initial, pairs, settings, tmp_path/'a', table).log
    mixed = train(initial, pairs, settings, tmp_path/'b', table.sample(frac=1, random_state=0)).log
    assert first.equals(mixed)
    with pytest.raises(ValueError, match='hold nothing for 6 of 6 rows'):
        train(initial, make_pairs(6, seed=9), settings, tmp_path/'c', table)


def test_reference_of_another_vocabulary(initial, tmp_path):
    foreign = random_model(tmp_path/'foreign')
    path = tmp_path/'foreign'/'tokenizer.json'
    path.write_text(path.read_text().replace('"~"', '"ä"'))
    with pytest.raises(ValueError, match='another vocabulary'):
        train(initial, make_pairs(2), DPO(updates=1), tmp_path/'out', foreign)


def test_parquet_and_datasets_rows(initial, tmp_path):
    pairs = make_pairs(5)
    pairs.to_parquet(tmp_path/'pairs.parquet')
    expected,_ = pair_tokens(tokenizer(), pairs)
    for rows in (pd.read_parquet(tmp_path/'pairs.parquet'), datasets.Dataset.from_pandas(pairs)):
        assert pair_tokens(tokenizer(), rows)[0].equals(expected)


def test_tokens_are_trls(initial, tmp_path):
    pairs = make_pairs(5)
    ours,_ = pair_tokens(tokenizer(), pairs)
    net,_ = load_model(initial, 'cpu')
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to='none', gradient_checkpointing=False,
                     precompute_ref_log_probs=True)
    theirs = DPOTrainer(net, args=args, train_dataset=datasets.Dataset.from_pandas(pairs),
                        processing_class=tokenizer()).train_dataset
    for name in ours: assert ours[name].tolist() == theirs[name]


def test_end_token_closes_chatml_answers():
    "The newline that ChatML writes after an end token is not trained: it is never sampled."
    rows = pd.DataFrame([dict(prompt=says('7', 'user'), completion=says('\n5\n'))])
    tokens,_ = example_tokens(tokenizer(CHATML, bos_token='<im>'), rows)
    made = tokenizer(CHATML)
    assert made.decode(tokens.completion_ids[0]) == '\n5\n</s>'
    assert made.decode(tokens.prompt_ids[0]) == '<im>user\n7</s>\n<im>assistant\n'


@pytest.mark.parametrize('template,special,fault', [
    (PLAIN, {}, None),
    (CHATML, dict(bos_token='<im>'), None),
    (PLAIN.replace('{{ eos_token }}', ''), {}, 'no end token'),
    (PLAIN.replace('{{ eos_token }}', '{{ eos_token }}\n{{ eos_token }}'), {}, 'second end token'),
    ('{{ bos_token }}'+PLAIN, {}, 'second begin token'),
    (PLAIN.replace("<bot>{{ m['content'] }}", "<bot> {{ m['content'] }}\n"), {}, None),
    (PLAIN.replace("<bot>{{ m['content'] }}", "<bot>{{ m['content'] }}."), {}, "turns the answer 'five' into 'five.'"),
    (PLAIN.replace("<bot>{{ m['content'] }}", "<bot>So: {{ m['content'] }}"), {}, "'five' into 'So: five'"),
    (PLAIN.replace('{% if add_generation_prompt %}<bot>', '{% if add_generation_prompt %}<bot>\n'), {}, None),
    (PLAIN.replace("<user>{{ m['content'] }}", '<user>'), {}, 'leaves out the question'),
    (PLAIN.replace("<bot>{{ m['content'] }}", '<bot>'), {}, 'leaves out the answer'),
    (PLAIN.replace('{{ bos_token }}', "{{ raise_exception('never') }}"), {}, 'refuses a question: .*never'),
    (None, {}, 'there is none'),
    (PLAIN, dict(eos_token=None), 'names no end token'),
])
def test_template_faults(template, special, fault):
    faults = template_faults(tokenizer(template, **special))
    assert (not faults) if fault is None else any(re.search(fault, f) for f in faults)


def test_template_without_begin_token_is_found():
    from tokenizers.processors import TemplateProcessing
    made = tokenizer(PLAIN.replace('{{ bos_token }}', ''))
    made.backend_tokenizer.post_processor = TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
    assert any('no begin token' in f for f in template_faults(made))
    made.chat_template = PLAIN
    check_template(made)
    ids = pair_tokens(made, make_pairs(1))[0].prompt_ids[0]
    assert ids.count(1) == 1


@pytest.mark.parametrize('prompt,chosen,match', [
    ('7', says('5'), "row 0 of the pairs: 'prompt' must be a list of messages"),
    (says('7', 'user'), says('5', 'user'), "row 0 of the pairs: 'chosen' must be one message of the assistant"),
    (says('7', 'user'), says('5')+says('6'), "'chosen' must be one message"),
    (says('7', 'user'), [{'role': 'assistant', 'content': None}], "'chosen' must be a list of messages"),
    (says('7', 'user'), [], "'chosen' must be a list of messages"),
])
def test_malformed_rows(prompt, chosen, match):
    with pytest.raises(ValueError, match=match):
        pair_tokens(tokenizer(), pd.DataFrame([dict(prompt=prompt, chosen=chosen, rejected=says('6'))]))


def test_long_rows_are_left_out_not_cut(initial, tmp_path):
    pairs = make_pairs(8)
    tokens,_ = pair_tokens(tokenizer(), pairs)
    lengths = tokens.prompt_ids.map(len)+np.maximum(tokens.chosen_ids.map(len), tokens.rejected_ids.map(len))
    limit = int(lengths.median())
    done = train(initial, pairs, DPO(updates=2, batch_size=4, max_length=limit), tmp_path/'out', initial)
    used = int((lengths <= limit).sum())
    kept = pairs[(lengths <= limit).to_numpy()]
    empty = sum('' in (c[0]['content'], r[0]['content']) for c, r in zip(kept.chosen, kept.rejected))
    assert empty and done.counts == dict(rows=8, too_long=8-used, end_token_inside=0, without_tokens=0, used=used,
                                         empty=empty, from_text=used)


def test_silent(initial, tmp_path, capfd):
    pairs,settings = make_pairs(4),DPO(updates=2, batch_size=4)
    train(initial, pairs, settings, tmp_path/'out', reference_log_probabilities(initial, pairs, settings))
    out,err = capfd.readouterr()
    assert 'loss' not in out+err and 'Map' not in err and 'arning' not in err
    assert not any(p.suffix in ('.bin', '.pt', '.pth') for p in (tmp_path/'out').rglob('*'))


KILLED = '''
import os, signal, sys
import pandas as pd
from mapo import training
from mapo.agents import Model
model,pairs,folder,where,rank = sys.argv[1:]
original = getattr(training, where) if where == 'seal_checkpoint' else training.PairTrainer.log
def die(): os.kill(os.getpid(), signal.SIGKILL)
def seal(path, inputs):
    if path.name == 'checkpoint-8': die()
    original(path, inputs)
def log(self, logs, start_time=None):
    original(self, logs, start_time)
    if self.state.global_step == 7: die()
if where == 'seal_checkpoint': training.seal_checkpoint = seal
else: training.PairTrainer.log = log
pairs = pd.read_parquet(pairs)
settings = training.DPO(updates=10, batch_size=4, micro_batch_size=2, learning_rate=1e-3, alpha=0.4, warmup=0.2,
                        schedule='cosine', lora_rank=int(rank))
initial = Model('initial', model)
training.train(initial, pairs, settings, folder, training.reference_log_probabilities(initial, pairs, settings), 4)
'''


@pytest.mark.parametrize('where,rank', [('log', 0), ('seal_checkpoint', 4)])
def test_killed_and_resumed_is_the_undisturbed(initial, tmp_path, where, rank):
    pairs = make_pairs(11)
    pairs.to_parquet(tmp_path/'pairs.parquet')
    code,said = Warm(KILLED, initial.path, tmp_path/'pairs.parquet', tmp_path/'killed', where, rank,
                     said=tmp_path/'said').wait()
    assert code == -9, said[-2000:]
    left = sorted(p.name for p in (tmp_path/'killed'/'checkpoints').iterdir())
    assert left == (['checkpoint-4'] if where == 'log' else ['checkpoint-4', 'checkpoint-8'])
    assert not (tmp_path/'killed'/'checkpoints'/'checkpoint-4'/'training_args.bin').exists()
    settings = DPO(updates=10, batch_size=4, micro_batch_size=2, learning_rate=1e-3, alpha=0.4, warmup=0.2,
                   schedule='cosine', lora_rank=rank)
    pairs,model = pd.read_parquet(tmp_path/'pairs.parquet'),replace(initial, name='initial')
    table = reference_log_probabilities(model, pairs, settings)
    whole = train(model, pairs, settings, tmp_path/'whole', table)
    with pytest.raises(ValueError, match='another model, rows or settings'):
        train(model, pairs, replace(settings, alpha=0.1), tmp_path/'killed', table)
    resumed = train(model, pairs, settings, tmp_path/'killed', table, checkpoint_every=4)
    name = 'adapter_model.safetensors' if rank else 'model.safetensors'
    assert (tmp_path/'killed'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()
    assert resumed.log.equals(whole.log)
    assert not (tmp_path/'killed'/'checkpoints').exists()


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_checkpoints_run_no_code(initial, tmp_path, monkeypatch):
    pairs,settings = make_pairs(4),DPO(updates=4, batch_size=4)
    table = reference_log_probabilities(initial, pairs, settings)
    run = lambda: train(initial, pairs, settings, tmp_path/'out', table, checkpoint_every=2)
    def stop(self, *args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training, '_log', stop)
        m.setattr(training.shutil, 'rmtree', lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt): run()
    checkpoint = tmp_path/'out'/'checkpoints'/'checkpoint-4'
    seal = json.loads((checkpoint/'checksums.json').read_text())
    with open(checkpoint/'optimizer.pt', 'wb') as f: pickle.dump(Trap(tmp_path/'sprung'), f)
    with pytest.raises(ValueError, match='optimizer.pt was changed after it was written'): run()
    training.seal_checkpoint(checkpoint, seal['inputs'])
    with pytest.raises(pickle.UnpicklingError, match='Weights only'): run()
    assert not (tmp_path/'sprung').exists()


def test_no_number_stops_before_a_checkpoint(initial, tmp_path):
    with pytest.raises(FloatingPointError, match='became nan at update 2 of 6'):
        train(initial, make_pairs(4).rename(columns={'chosen': 'completion'}),
              SFT(updates=6, batch_size=4, learning_rate=1e30), tmp_path/'out', checkpoint_every=2)
    assert list((tmp_path/'out'/'checkpoints').iterdir()) == []
    assert not (tmp_path/'out'/'model.safetensors').exists()


def test_same_inputs_same_bytes_and_seed_matters(initial, tmp_path):
    pairs,settings = make_pairs(9),DPO(updates=3, batch_size=4, learning_rate=1e-3, alpha=.2)
    table = reference_log_probabilities(initial, pairs, settings)
    bytes_of = lambda name, **changes: (Path(train(initial, pairs, replace(settings, **changes), tmp_path/name,
                                                   table).model.path)/'model.safetensors').read_bytes()
    first = bytes_of('a')
    torch.rand(3), np.random.rand(3)
    assert first == bytes_of('b') and first != bytes_of('c', seed=1)


def test_bfloat16_models_are_trained_in_float32(initial, tmp_path):
    pairs,settings = make_pairs(4),DPO(updates=1, batch_size=4, learning_rate=7e-7, alpha=.2)
    half = replace(initial, dtype='bfloat16')
    done = train(half, pairs, settings, tmp_path/'out', half)
    before,after = (load_model(replace(m, dtype='float32'), 'cpu')[0].state_dict() for m in (half, done.model))
    assert done.model.dtype == 'bfloat16'
    assert 0 < max((after[k]-before[k]).abs().max().item() for k in before) < 1e-6


def conversations(pairs, side): return [p+a for p, a in zip(pairs.prompt, pairs[side])]


def scores(model, pairs, side):
    return RewardScorer(model, device='cpu', progress=False).score(conversations(pairs, side))


@pytest.mark.parametrize('batch,micro', [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize('center', [0., .1])
def test_reward_loss_is_the_formula(initial, tmp_path, batch, micro, center):
    pairs = make_pairs(batch)
    untrained = Model('untrained', str(save_model(*new_reward_model(initial, 5, 'cpu'), tmp_path/'untrained')))
    chosen,rejected = (scores(untrained, pairs, side) for side in ('chosen', 'rejected'))
    first = train(initial, pairs, Reward(updates=1, batch_size=batch, micro_batch_size=micro, center=center, seed=5),
                  tmp_path/'out').log.iloc[0]
    assert first.loss == pytest.approx((np.log1p(np.exp(rejected-chosen)) + center*(chosen+rejected)**2).mean(),
                                       abs=1e-5)
    assert first.margin == pytest.approx((chosen-rejected).mean(),
                                         abs=1e-5) and first.accuracy == pytest.approx((chosen > rejected).mean())


def test_reward_training_is_trls(initial, tmp_path):
    pairs,settings = make_pairs(7),Reward(updates=3, batch_size=4, learning_rate=1e-3)
    ours = train(initial, pairs, settings, tmp_path/'ours')
    theirs = trl(RewardTrainer, RewardConfig, new_reward_model(initial, 0, 'cpu')[0], in_order(pairs, settings),
                 tmp_path/'theirs')
    assert ours.log.loss.tolist() == [h['loss'] for h in theirs.state.log_history if 'loss' in h]
    trained = load_reward_model(ours.model, 'cpu')[0].state_dict()
    assert all(torch.equal(trained[k], v) for k, v in theirs.model.state_dict().items())
    cut = train(initial, pairs, replace(settings, micro_batch_size=1), tmp_path/'cut')
    assert np.allclose(ours.log.loss, cut.log.loss, atol=1e-4)
    assert {'step', 'loss', 'accuracy', 'margin'} <= set(ours.log) and len(ours.log) == 3


def test_a_reward_model_learns_a_rule_and_says_it_of_new_answers(initial, tmp_path):
    "Answers that hold a 3 are better: 40 pairs show it in 40 others, and a trained model trains on from where it is."
    def ruled(seed):
        rng = np.random.default_rng(seed)
        word = lambda letters: says(''.join(rng.choice(list(letters), 6)))
        return pd.DataFrame([dict(prompt=says(f'{i}=', 'user'), chosen=word('123'), rejected=word('12'))
                             for i in range(40)])
    share = lambda model: (scores(model, ruled(1), 'chosen') > scores(model, ruled(1), 'rejected')).mean()
    settings = Reward(updates=25, batch_size=16, learning_rate=1e-3)
    one = train(initial, ruled(0), settings, tmp_path/'one')
    assert share(one.model) > .85
    before = (scores(one.model, ruled(0), 'chosen') - scores(one.model, ruled(0), 'rejected')).mean()
    two = train(one.model, ruled(0), replace(settings, updates=1, batch_size=40), tmp_path/'two')
    assert two.log.margin[0] == pytest.approx(before, abs=1e-4)
    assert two.model == replace(one.model, path=str(tmp_path/'two'))


def test_what_a_reward_model_learns_is_what_is_scored(tmp_path):
    "Under ChatML both end with the newline after the end token; the one inside an answer is left out and counted."
    from mapo.engines import conversation_ids
    made,pairs = tokenizer(CHATML),make_pairs(5)
    pairs.at[2, 'rejected'] = says('5</s>6')
    tokens,counts = reward_tokens(made, pairs)
    assert counts == dict(rows=5, too_long=0, end_token_inside=1, without_tokens=0, used=4, empty=1, from_text=4)
    assert tokens.index.tolist() == [0, 1, 3, 4]
    for side in ('chosen', 'rejected'):
        assert tokens[f'{side}_ids'].tolist() == conversation_ids(made, conversations(pairs.loc[tokens.index], side))
    assert made.decode(tokens.chosen_ids[0]).endswith('</s>\n')


def test_inits_that_cannot_become_reward_models_are_refused(initial, tmp_path):
    net,made = new_reward_model(initial, 0, 'cpu')
    net.config.num_labels = 2
    save_model(type(net)(net.config), made, tmp_path/'two')
    with pytest.raises(ValueError, match="model 'two' gives 2 numbers per answer"):
        train(Model('two', str(tmp_path/'two')), make_pairs(4), Reward(updates=1), tmp_path/'out')
    with pytest.raises(ValueError, match='has a LoRA adapter'):
        train(replace(initial, adapter='low'), make_pairs(4), Reward(updates=1), tmp_path/'out')
    with pytest.raises(FloatingPointError, match='at update 2 of 6'):
        train(initial, make_pairs(4), Reward(updates=6, batch_size=4, learning_rate=1e30), tmp_path/'out')
    assert not (tmp_path/'out'/'model.safetensors').exists()


@pytest.mark.parametrize('template,special,fault', [
    ('{{ bos_token }}'+PLAIN, {}, 'second begin token'), (PLAIN.replace('{{ eos_token }}', ''), {}, 'no end token'),
    (PLAIN.replace('{{ eos_token }}', '{{ eos_token }}{{ eos_token }}'), {}, 'second end token')])
@pytest.mark.parametrize('objective', [SFT(updates=1), DPO(updates=1), Reward(updates=1)])
def test_no_training_begins_under_a_faulty_template(initial, tmp_path, template, special, fault, objective):
    save_model(load_model(initial, 'cpu')[0], tokenizer(template, **special), tmp_path/'faulty')
    faulty,rows = Model('faulty', str(tmp_path/'faulty')),make_pairs(4)
    if objective.answers == ('completion',): rows = rows.rename(columns={'chosen': 'completion'})
    with pytest.raises(ValueError, match=f'cannot be trained with: .*{fault}'):
        train(faulty, rows, objective, tmp_path/'out', initial)
    assert not (tmp_path/'out').exists()


KILLED_REWARD = """
import os, signal, sys
import pandas as pd
from mapo import training
from mapo.agents import Model
original = training.ScoreTrainer.log
def log(self, logs, start_time=None):
    original(self, logs, start_time)
    if self.state.global_step == 7: os.kill(os.getpid(), signal.SIGKILL)
training.ScoreTrainer.log = log
model,pairs,folder = sys.argv[1:]
settings = training.Reward(updates=10, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
training.train(Model('initial', model), pd.read_parquet(pairs), settings, folder, checkpoint_every=4)
"""


def test_a_killed_reward_training_goes_on_to_the_same_bytes(initial, tmp_path):
    make_pairs(11).to_parquet(tmp_path/'pairs.parquet')
    code,said = Warm(KILLED_REWARD, initial.path, tmp_path/'pairs.parquet', tmp_path/'killed',
                     said=tmp_path/'said').wait()
    assert code == -9, said[-2000:]
    assert [p.name for p in (tmp_path/'killed'/'checkpoints').iterdir()] == ['checkpoint-4']
    pairs = pd.read_parquet(tmp_path/'pairs.parquet')
    model = replace(initial, name='initial')
    settings = Reward(updates=10, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
    whole = train(model, pairs, settings, tmp_path/'whole')
    resumed = train(model, pairs, settings, tmp_path/'killed', checkpoint_every=4)
    assert (tmp_path/'killed'/'model.safetensors').read_bytes() == (tmp_path/'whole'/'model.safetensors').read_bytes()
    assert resumed.log.equals(whole.log)
