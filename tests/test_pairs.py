"""Pairs against a slow, plain reading of the rules; ledgers that add up; Parquet, datasets and TRL."""
from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mapo.pairs import (MESSAGES, Selection, as_sampled, corrected_and_kept, cross, distinct, hash_texts, hashed,
                        hybrid_pairs, hybrid_positives, losers, own_contexts,
                        own_pairs, own_positives, pooled_pairs, reward_pairs, teach, to_arrow, winners, with_mistakes)
from mapo.rewards import example_turns

AGENTS = ['ada', 'bob', 'cid']
QUESTIONS = pd.DataFrame(dict(problem_id=[f'p{i}' for i in range(30)], question='?'))
EVERY = Selection(n_positives=0, n_negatives=0, n_pairs=0)
BUILDERS = dict(hybrid_pairs=(hybrid_pairs, AGENTS, ['ada']), own_pairs=(own_pairs, ['ada'], ['ada']),
                pooled_pairs=(pooled_pairs, AGENTS, AGENTS))


def random_turns(seed, n_problems=30, n=6):
    "Turns with few distinct texts, some with spaces around, cut off, empty or unscored; some problems not asked."
    rng = np.random.default_rng(seed)
    said = {a: {f'p{i}': [' '*rng.integers(2) + ['', 'one', 'two', 'three', 'four'][rng.integers(5)] for _ in range(n)]
                for i in range(n_problems) if rng.random() < .9} for a in AGENTS}
    turns = example_turns(said)
    score = rng.choice([0., 1., np.nan], p=[.45, .45, .1], size=len(turns))
    turns = turns.assign(correct=score, reward=rng.random(len(turns)),
                         finish_reason=rng.choice(['stop', 'length'], p=[.8, .2], size=len(turns)))
    contexts = pd.DataFrame(dict(context_id=turns.context_id.unique())).assign(
        messages=lambda t: [[dict(role='user', content=f'ask {c}')] for c in t.context_id])
    return turns.sample(frac=1, random_state=seed).reset_index(drop=True), contexts


def slowly(turns, agents, right):
    "By problem: the distinct stripped texts that may be chosen (or rejected), by the letter of the rules."
    scores, finished = defaultdict(list), defaultdict(bool)
    for t in turns.itertuples():
        if t.agent not in agents or np.isnan(t.correct): continue
        scores[t.problem_id, t.text.strip()].append(t.correct)
        finished[t.problem_id, t.text.strip()] |= t.finish_reason == 'stop'
    found = defaultdict(set)
    for (problem, text), values in scores.items():
        good = np.mean(values) > .5
        if good == right and (not right or (finished[problem, text] and text)): found[problem].add(text)
    return found


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('name', BUILDERS)
def test_pairs_are_what_the_rules_say(name, seed):
    build, from_right, from_wrong = BUILDERS[name]
    turns, contexts = random_turns(seed)
    right, wrong = slowly(turns, from_right, True), slowly(turns, from_wrong, False)
    asked = set(turns.problem_id[turns.agent == 'ada'])
    expected = {(p, w, l) for p in asked for w, l in product(right[p], wrong[p]) if w != l}
    table, counts = build(turns, contexts, 'ada', EVERY)
    got = [(p, c[0]['content'].strip(), r[0]['content'].strip())
           for p, c, r in zip(table.problem_id, table.chosen, table.rejected)]
    assert len(got) == len(set(got)) and set(got) == expected
    assert (table.context_id == 'ada-' + table.problem_id).all()
    assert all(prompt == [dict(role='user', content=f'ask {c}')] for prompt, c in zip(table.prompt, table.context_id))
    assert set(table.chosen_agent) <= set(from_right) and set(table.rejected_agent) <= set(from_wrong)
    by_id = turns.set_index('turn_id')
    for side in ('chosen', 'rejected'):
        assert [c[0]['content'] for c in table[side]] == by_id.text[table[f'{side}_id']].tolist()
        assert (by_id.agent[table[f'{side}_id']].to_numpy() == table[f'{side}_agent'].to_numpy()).all()
        assert (by_id.model_key[table[f'{side}_id']].to_numpy() == table[f'{side}_model'].to_numpy()).all()
    assert (by_id.finish_reason[table.chosen_id] == 'stop').all()


@pytest.mark.parametrize('selection', [EVERY, Selection(),
                                       Selection(n_positives=1, n_negatives=2, n_pairs=1, order='reward', seed=3),
                                       replace(EVERY, by='context_id')])
@pytest.mark.parametrize('name', BUILDERS)
def test_every_exclusion_is_counted(name, selection):
    turns, contexts = random_turns(7)
    table, counts = BUILDERS[name][0](turns, contexts, 'ada', selection)
    total = counts.groupby('part')['count'].sum()
    assert total['chosen'] == total['rejected'] == len(turns)
    assert total['problems'] == turns[selection.by].nunique()
    fate = counts.set_index(['part', 'fate'])['count']
    assert fate['pairs', 'paired'] == len(table) and fate['problems', 'paired'] == table[selection.by].nunique()
    chosen, rejected = (f(turns, a, selection).table[selection.by].value_counts()
                        for f, a in zip((winners, losers), [*BUILDERS[name][1:]]))
    assert total['pairs'] == (chosen*rejected).sum()
    assert (counts['count'] > 0).all() and (counts.agent == 'ada').all()


@pytest.mark.parametrize('build', [own_positives, hybrid_positives])
def test_every_exclusion_of_examples_is_counted(build):
    turns, contexts = random_turns(8)
    table, counts = build(turns, contexts, 'ada', EVERY)
    total = counts.groupby('part')['count'].sum()
    assert total['chosen'] == len(turns)
    assert total['examples'] == counts.query("part == 'chosen' and fate == 'selected'")['count'].sum()
    assert counts.query("part == 'examples' and fate == 'taught'")['count'].sum() == len(table)
    assert set(table.problem_id) <= set(turns.problem_id[turns.agent == 'ada'])
    assert table.prompt.notna().all()


def slowly_best(turns, n):
    "By problem: the `n` distinct finished texts of the highest mean reward, right or wrong."
    rewards, finished = defaultdict(list), defaultdict(bool)
    for t in turns[turns.correct.notna()].itertuples():
        rewards[t.problem_id, t.text.strip()].append(t.reward)
        finished[t.problem_id, t.text.strip()] |= t.finish_reason == 'stop'
    best = defaultdict(set)
    for (problem, text), _ in sorted(rewards.items(), key=lambda kv: -np.mean(kv[1])):
        if text and finished[problem, text] and len(best[problem]) < n: best[problem].add(text)
    return best


@pytest.mark.parametrize('seed', range(5))
def test_ranked_only_takes_the_highest_reward_right_or_wrong(seed):
    turns, contexts = random_turns(seed)
    selection = replace(EVERY, verified=False, order='reward', n_positives=2)
    best, wrong = slowly_best(turns, 2), slowly(turns, ['ada'], False)
    asked = set(turns.problem_id[turns.agent == 'ada'])
    table, counts = hybrid_pairs(turns, contexts, 'ada', selection)
    got = [(p, c[0]['content'].strip(), r[0]['content'].strip())
           for p, c, r in zip(table.problem_id, table.chosen, table.rejected)]
    assert len(got) == len(set(got))
    assert set(got) == {(p, w, l) for p in asked for w, l in product(best[p], wrong[p]) if w != l}
    assert 'wrong' not in set(counts.query("part == 'chosen'").fate)
    assert counts.query("part == 'chosen'")['count'].sum() == len(turns)
    assert losers(turns, ['ada'],
                  selection).table.equals(losers(turns, ['ada'], replace(selection, verified=True)).table)


@pytest.mark.parametrize('selection', [EVERY, Selection(n_positives=1, n_negatives=2, n_pairs=2, seed=3)])
def test_reward_pairs_are_right_over_wrong_under_the_bare_question(selection):
    turns, _ = random_turns(3)
    problems = pd.DataFrame(dict(problem_id=turns.problem_id.unique())).assign(
        question=lambda p: 'what is ' + p.problem_id)
    table, counts = reward_pairs(turns, problems, selection)
    right, wrong = slowly(turns, AGENTS, True), slowly(turns, AGENTS, False)
    everything = {(p, w, l) for p in right for w, l in product(right[p], wrong[p]) if w != l}
    got = [(p, c[0]['content'].strip(), r[0]['content'].strip())
           for p, c, r in zip(table.problem_id, table.chosen, table.rejected)]
    assert len(got) == len(set(got)) and set(got) <= everything and (selection != EVERY or set(got) == everything)
    assert all(prompt == [dict(role='user', content=f'what is {p}')]
               for prompt, p in zip(table.prompt, table.problem_id))
    assert (table.agent == '').all() and (table.context_id == '').all() and set(table.chosen_agent) == set(AGENTS)
    total = counts.groupby('part')['count'].sum()
    assert total['chosen'] == total['rejected'] == len(turns) and total['problems'] == turns.problem_id.nunique()
    assert len(table) == counts.query("fate == 'paired' and part == 'pairs'")['count'].sum()
    assert (counts.agent == '').all()
    assert table.equals(reward_pairs(turns, problems, selection).table)


def test_equal_texts_are_averaged_before_they_are_labelled():
    turns = example_turns({'ada': {'p': ['x', ' x', 'x\n', 'y', 'z']}}).assign(correct=[1., 0., 0., 1., 0.])
    assert set(winners(turns, None, EVERY).table.turn_id) == {'ada-p-3'}
    lost = losers(turns, None, EVERY).table
    assert dict(zip(lost.text_hash, lost.correct)) == dict(zip(hash_texts(turns.text)[[0, 4]], [pytest.approx(1/3), 0]))


def test_no_seat_is_favoured_where_several_wrote_the_same():
    turns = example_turns({agent: {f'p{i}': ['x'] for i in range(400)}
                           for agent in ('ada', 'bob', 'cid', 'dan')}).assign(correct=1.)
    who = winners(turns, None, EVERY).table
    assert sorted(who.problem_id) == sorted(f'p{i}' for i in range(400))
    assert who.agent.value_counts().between(70, 130).all() # 100 each, 3.5 standard errors


def test_one_half_is_not_right():
    turns = example_turns({'ada': {'p': ['x', 'x', 'y']}}).assign(correct=[1., 0., 1.])
    assert set(winners(turns, None, EVERY).table.turn_id) == {'ada-p-2'}


def test_texts_equal_for_the_pair_but_judged_differently_never_meet():
    turns = example_turns({'ada': {'p': ['x', 'y']}, 'bob': {'p': ['x', 'x']}}).assign(correct=[0., 1., 1., 1.])
    contexts = pd.DataFrame(dict(context_id=['ada-p', 'bob-p'], messages=[[dict(role='user', content='?')]]*2))
    table, counts = hybrid_pairs(turns, contexts, 'ada', EVERY)
    assert [(c[0]['content'], r[0]['content']) for c, r in zip(table.chosen, table.rejected)] == [('y', 'x')]
    assert counts.query("fate == 'of equal texts'")['count'].tolist() == [1]
    assert '1 only equal texts' in hybrid_pairs(turns[turns.text == 'x'], contexts, 'ada', EVERY).reason


def test_selection_depends_neither_on_the_order_nor_on_other_problems():
    turns, contexts = random_turns(9)
    selection = Selection(n_positives=2, n_negatives=2, n_pairs=3)
    ids = lambda t: set(zip(t.chosen_id, t.rejected_id))
    once = turns.drop_duplicates(['problem_id', 'agent', 'text'])
    texts = once.assign(text=lambda t: t.turn_id + t.text, finish_reason='stop') # nothing merges
    whole = ids(hybrid_pairs(texts, contexts, 'ada', selection).table)
    assert ids(hybrid_pairs(texts.sample(frac=1, random_state=1), contexts, 'ada', selection).table) == whole
    half = texts[texts.problem_id < 'p2']
    assert ids(hybrid_pairs(half, contexts, 'ada', selection).table) == {p for p in whole if p[0].split('-')[1] < 'p2'}
    assert ids(hybrid_pairs(texts, contexts, 'ada', replace(selection, seed=1)).table) != whole


def test_limits_hold_and_texts_are_used_evenly():
    said = {'ada': {'p': [f't{i}' for i in range(20)]}}
    turns = example_turns(said).assign(correct=[1., 0.]*10)
    contexts = pd.DataFrame(dict(context_id=['ada-p'], messages=[[dict(role='user', content='?')]]))
    table = own_pairs(turns, contexts, 'ada', Selection(n_positives=4, n_negatives=4, n_pairs=8)).table
    assert len(table) == 8 and set(table.chosen_id.value_counts()) == set(table.rejected_id.value_counts()) == {2}


def test_columns_are_those_of_the_data_model_and_survive_parquet_datasets_and_concat(tmp_path):
    turns, contexts = random_turns(10)
    pairs = pd.concat([hybrid_pairs(turns, contexts, a).table for a in AGENTS], ignore_index=True)
    examples = hybrid_positives(turns, contexts, 'bob').table
    assert [*pairs] == ['prompt', 'chosen', 'rejected', 'problem_id', 'agent', 'context_id', 'chosen_id', 'rejected_id',
                        'chosen_agent', 'rejected_agent', 'chosen_model', 'rejected_model', 'rejected_finish']
    assert pairs.rejected_finish.tolist() == turns.set_index('turn_id').finish_reason[pairs.rejected_id].tolist()
    assert set(pairs.rejected_finish) == {'stop', 'length'}
    assert [*examples] == ['prompt', 'completion', 'problem_id', 'agent', 'context_id', 'turn_id', 'source_agent',
                           'source_model', 'copies']
    pq.write_table(to_arrow(pairs), tmp_path/'pairs.parquet')
    again = pd.read_parquet(tmp_path/'pairs.parquet')
    assert [c[0]['content'] for c in again.chosen] == [c[0]['content'] for c in pairs.chosen]
    datasets, trl = pytest.importorskip('datasets'), pytest.importorskip('trl')
    row = datasets.Dataset(to_arrow(pairs))[0]
    assert trl.is_conversational(row) and row['prompt'] == pairs.prompt[0] and row['chosen'] == pairs.chosen[0]
    loaded = datasets.load_dataset('parquet', data_files=str(tmp_path/'pairs.parquet'), split='train',
                                   cache_dir=str(tmp_path))
    assert loaded[0] == row


@pytest.mark.parametrize('held', ['lists', 'numpy', 'arrow in chunks'])
def test_pairs_and_examples_bring_the_ids_of_the_turns_they_name(held, tmp_path):
    "Whatever holds them, in any order, some turns without; and through Parquet."
    turns, contexts = random_turns(17)
    rng = np.random.default_rng(0)
    ids = [None if i % 7 == 0 else rng.integers(0, 10**6, rng.integers(0, 9)).tolist() for i in range(len(turns))]
    of = dict(zip(turns.turn_id, ids))
    kind = pa.list_(pa.int32())
    parts = [pd.Series(pa.array(ids[i:i+50], kind), dtype=pd.ArrowDtype(kind)) for i in range(0, len(ids), 50)]
    arrays = [None if i is None else np.array(i, 'int32') for i in ids]
    column = {'lists': ids, 'numpy': arrays, 'arrow in chunks': pd.concat(parts, ignore_index=True)}[held]
    turns = turns.assign(tokens=column, tokenizer=['' if i is None else f'{len(i)}' for i in ids])
    pairs = hybrid_pairs(turns, contexts, 'ada', EVERY).table
    examples = as_sampled(hybrid_positives(turns, contexts, 'ada', EVERY)).table
    key = turns.set_index('turn_id').tokenizer
    for table, side, turn in ((pairs, 'chosen_', 'chosen_id'), (pairs, 'rejected_', 'rejected_id'),
                              (examples, '', 'turn_id')):
        pq.write_table(to_arrow(table), tmp_path/'rows.parquet')
        found = pq.read_table(tmp_path/'rows.parquet')
        assert found.schema.field(f'{side}tokens').type.value_type == pa.int32()
        assert found[f'{side}tokens'].to_pylist() == [of[t] for t in table[turn]]
        assert table[f'{side}tokenizer'].tolist() == key[table[turn]].tolist()


def test_contexts_may_come_from_memory_or_from_parquet(tmp_path):
    turns, contexts = random_turns(11)
    contexts.to_parquet(tmp_path/'contexts.parquet')
    as_arrow = contexts.assign(messages=pd.Series(pa.array(contexts.messages.tolist(), MESSAGES),
                                                  dtype=pd.ArrowDtype(MESSAGES)))
    for other in (pd.read_parquet(tmp_path/'contexts.parquet'), as_arrow):
        assert own_pairs(turns, other, 'ada').table.equals(own_pairs(turns, contexts, 'ada').table)


def test_texts_in_many_chunks_and_as_objects():
    turns, contexts = random_turns(12)
    pieces = pd.concat([turns[i:i+7] for i in range(0, len(turns), 7)])
    for other in (pieces, turns.astype({'text': object})):
        assert hybrid_pairs(other, contexts, 'ada').table.equals(hybrid_pairs(turns, contexts, 'ada').table)


def test_texts_that_break_naive_code():
    hostile = ['<script>alert(1)</script>', '$x$', '\x00', '\u202e', '🤖'*1000, 'a'*1_000_000]
    turns = example_turns({'ada': {'p': hostile}}).assign(correct=[1., 0.]*3)
    contexts = pd.DataFrame(dict(context_id=['ada-p'], messages=[[dict(role='user', content='?')]]))
    table = own_pairs(turns, contexts, 'ada', EVERY).table
    assert {c[0]['content'] for c in table.chosen} == set(hostile[::2])
    assert {r[0]['content'] for r in table.rejected} == set(hostile[1::2])
    assert len(set(hash_texts(turns.text))) == len(hostile)


def test_no_turns_at_all():
    turns, contexts = random_turns(13)
    for build in (own_pairs, hybrid_pairs, own_positives, pooled_pairs):
        built = build(turns[:0], contexts, 'ada', Selection(missed=True))
        assert built.table.empty and built.reason.endswith('it was never asked')
    assert len(distinct(turns[:0], 'correct')) == len(winners(turns[:0]).table) == 0


def test_winners_of_other_turns_are_refused():
    turns, contexts = random_turns(14)
    w, l, prompts = winners(turns), losers(turns, ['ada']), own_contexts(turns, contexts, 'ada')
    with pytest.raises(ValueError, match='selected from other turns'): cross(turns[::-1], w, l, prompts, 'ada')
    with pytest.raises(ValueError, match='selected from other turns'): teach(turns[:5], w, prompts, 'ada')


def test_hashing_once_changes_nothing():
    turns, contexts = random_turns(15)
    for agent in AGENTS:
        assert hybrid_pairs(hashed(turns), contexts, agent).table.equals(hybrid_pairs(turns, contexts, agent).table)


def random_debate(seed, n_problems=60, seats=3, rounds=3):
    "Turns whose answers agree at random, a summary before every critic's turn, in shuffled order with a broken index."
    rng = np.random.default_rng(seed)
    rows = [dict(turn_id=f'{p}-{s}-{r}{role[0]}', context_id=f'{p}-{s}-{r}{role[0]}', problem_id=f'p{p}', split='train',
                 purpose='train', iteration=1, round=r, seat=s,
                 agent=f'{role}-{s}', role=role, text=f'{role} {s} {r}', finish_reason='stop', model_key='m',
                 agrees=float(rng.random() < .6))
            for p in range(n_problems) for s in range(seats) for r in range(rounds)
            for role in (['generator'] if r == 0 else ['summarizer', 'critic'])]
    return pd.DataFrame(rows, index=np.zeros(len(rows), int)).sample(frac=1, random_state=seed)


@pytest.mark.parametrize('critic_turns', ['last', 'all agreeing'])
@pytest.mark.parametrize('share', [0, .1, 1/3, .5, 2/3, 1])
def test_critics_learn_corrected_and_kept_turns_in_the_stated_share(share, critic_turns):
    for seed in range(5):
        debate = random_debate(seed)
        found, counts = corrected_and_kept(debate, 1, share, critic_turns)
        said = {(t.problem_id, t.round): t.agrees
                for t in debate[(debate.seat == 1) & (debate.role != 'summarizer')].itertuples()}
        may = {(p, r) for (p, r), agrees in said.items() if said[p, 2] and r > 0
               and (agrees if critic_turns == 'all agreeing' else r == 2)}
        sets = dict(corrected={c for c in may if not said[c[0], 0]}, kept={c for c in may if said[c[0], 0]})
        taken = {name: {(t.problem_id, t.round) for t in found[found.lesson == name].itertuples()} for name in sets}
        assert all(taken[name] <= sets[name]
                   for name in sets) and set(found.seat) == {1} and set(found.role) == {'critic'}
        assert any(taken[name] == sets[name] for name in sets), 'only the larger set is cut'
        assert abs(len(taken['corrected']) - share*len(found)) <= .5 + 1e-9
        assert counts['count'].sum() == 120


def test_the_order_of_the_turns_decides_nothing_about_critics():
    debate = random_debate(0)
    drawn = [set(corrected_and_kept(t, 0).table.turn_id) for t in (debate, debate[::-1])]
    assert drawn[0] == drawn[1] != set(corrected_and_kept(debate, 0, seed=1).table.turn_id)


def test_a_seat_without_corrections_has_nothing_to_learn_but_what_it_kept():
    debate = random_debate(0).assign(agrees=1.)
    assert '60 not the last turn, 60 kept over the share' in corrected_and_kept(debate, 2).reason
    assert len(corrected_and_kept(debate, 2, share=0).table) == 60


def test_examples_as_often_as_they_were_sampled():
    turns, contexts = random_turns(3)
    examples = own_positives(turns, contexts, 'ada', replace(EVERY, by='context_id'))
    again, counts = as_sampled(examples)
    said = [(t.context_id, t.text.strip()) for t in turns[(turns.agent == 'ada') & turns.correct.notna()].itertuples()]
    for t in again.drop_duplicates('turn_id').itertuples():
        assert (again.turn_id == t.turn_id).sum() == said.count((t.context_id, t.completion[0]['content'].strip()))
    assert counts.loc[counts.part == 'examples', 'count'].sum() == len(again)


def asked_pairs(turns, contexts, agent, selection): return reward_pairs(turns, QUESTIONS, selection)


@pytest.mark.parametrize('build', [hybrid_pairs, own_pairs, pooled_pairs, hybrid_positives, own_positives, asked_pairs])
def test_a_summary_is_never_learnt_from(build):
    "Not even one that somebody scored, of the agent itself, and of a text that nobody else wrote."
    turns, contexts = random_turns(0)
    asked = turns[turns.agent == 'ada'].drop_duplicates('problem_id')
    asked = asked.assign(role='summarizer', finish_reason='stop')
    scored = lambda score: asked.assign(turn_id=asked.turn_id + f'-{score}', text=f'all say {score}', correct=score)
    with_them = pd.concat([turns, scored(0.), scored(1.)], ignore_index=True)
    without, found = build(turns, contexts, 'ada', EVERY), build(with_them, contexts, 'ada', EVERY)
    assert found.table.equals(without.table)
    assert found.counts.query("fate == 'a summary'")['count'].tolist() in ([2*len(asked)], [2*len(asked)]*2)


def test_a_summarizer_makes_no_mistakes():
    turns, _ = random_turns(0)
    mute = turns.assign(role=np.where(turns.agent == 'ada', 'summarizer', 'generator'), correct=0.)
    assert 'no mistake of its own' in with_mistakes(mute, 'ada').reason
