"The shipped tiny agents: one tokenizer, a faithful template, planted weaknesses, and context that is used."
import random
import re

import numpy as np
import pytest

from mapo.agents import CHECKPOINTS
from mapo.answers import extract_answer
from mapo.engines import Request, Sampling, TransformersEngine, load_tokenizer
from mapo.tiny import (FLAWLESS, FORM, HIGH, LOW, RECIPES, ROLES, VOCABULARY, draw_habits, make_tokenizer, quoted,
                       same_weakness, solve, specialists, tiny_agent, tiny_problems, train_tiny, verified, written)

N = 150
DEV = tiny_problems(1, N, seed=3).query("split == 'dev'")
QUESTIONS, ANSWERS = DEV['question'].tolist(), DEV['answer'].tolist()
SHIPPED = [name for name in RECIPES if (CHECKPOINTS/name).is_dir()]


def operands(question): return tuple(map(int, re.findall(r'\d', question)))


def ask(name, contexts, temperature=1.):
    engine = TransformersEngine(tiny_agent(name).model, device='cpu', progress=False)
    first = 10**6*list(RECIPES).index(name) # agents draw independently
    requests = [Request(tuple(c), first + 1000*i) for i, c in enumerate(contexts)]
    return [texts[0].text for texts in engine.generate(requests, Sampling(temperature=temperature, max_tokens=64))]


def user(role, **fields): return dict(role='user', content=ROLES[role].format(**fields))


def accuracy(texts): return np.mean([extract_answer(t) == a for t, a in zip(texts, ANSWERS)])


@pytest.fixture(scope='module')
def said(): return {name: ask(name, [[user('generator', question=q)] for q in QUESTIONS]) for name in SHIPPED}


def test_teams_and_base_ship_and_are_small():
    assert set(SHIPPED) == {'base', *(agent.name for team in (specialists(), same_weakness()) for agent in team)}
    assert sum(f.stat().st_size for name in SHIPPED for f in (CHECKPOINTS/name).iterdir()) < 8e6


@pytest.mark.parametrize('name', SHIPPED)
def test_one_tokenizer_for_all(name):
    tokenizer = load_tokenizer(tiny_agent(name).model)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert tokenizer.tokenize('<solve>7é') == ['<solve>', '7', '<unk>']


def test_a_debate_is_prefix_consistent_with_one_start_and_an_end_per_answer():
    tokenizer = make_tokenizer()
    talk = [user('generator', question='2*3+4*5-6'), dict(role='assistant', content='#### 20'),
            user('critic', others=quoted(['#### 20'])), dict(role='assistant', content='#### 21')]
    whole = tokenizer.apply_chat_template(talk, return_dict=False)
    for turns in (1, 3):
        context = tokenizer.apply_chat_template(talk[:turns], add_generation_prompt=True, return_dict=False)
        assert whole[:len(context)] == context
    assert [whole.count(tokenizer.bos_token_id), whole.count(tokenizer.eos_token_id),
            whole[-1]] == [1, 2, tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in whole


def test_flawless_solutions_are_right_for_every_tiny_problem():
    r = random.Random(0)
    problems = tiny_problems(19000, 6000, 6000)
    assert not (set(problems.query("split == 'train'")['question'])
                & set(problems.query("split != 'train'")['question']))
    assert [solve(operands(q), FLAWLESS, r)[4] for q in problems['question']] == problems['answer'].tolist()
    assert (FORM, LOW, HIGH) == ('a*b+c*d-e', 2, 9)


def test_specialists_are_half_right_and_together_nearly_always(said):
    right = {name: np.array([extract_answer(t) == a for t, a in zip(said[name], ANSWERS)]) for name in SHIPPED}
    for agent in (*specialists(), *same_weakness()): assert .38 < right[agent.name].mean() < .72, agent.name
    anyone = lambda team: np.any([right[a.name] for a in team], 0).mean()
    assert anyone(specialists()) > .8 and anyone(specialists()) > anyone(same_weakness())


def test_a_critic_uses_what_it_is_shown(said):
    r = random.Random(0)
    good = [written(solve(operands(q), FLAWLESS, r)) for q in QUESTIONS]
    never = draw_habits(0, products=(.5, .5), borrows=(.5, .5), carries=(.5, .5), slip=.1)
    bad = [written(next(s for s in iter(lambda: solve(operands(q), never, r), None) if s[4] != a))
           for q, a in zip(QUESTIONS, ANSWERS)]
    talk = [[user('generator', question=q), dict(role='assistant', content=t)] for q, t in zip(QUESTIONS, said['base'])]
    helped, misled = (accuracy(ask('base', [[*t, user('critic', others=quoted([x, x]))] for t, x in zip(talk, shown)]))
                      for shown in (good, bad))
    assert helped > misled + .1


def test_the_verifier_judges_better_than_chance(said):
    "Balanced over right and wrong answers, sampled; two draws of each judgement."
    shown = [[user('verifier', question=q, answer=t)] for q, t in zip(QUESTIONS, said['base'])]*2
    critiques, true = ask('base', shown), np.array([extract_answer(t) == a for t, a in zip(said['base'], ANSWERS)]*2)
    approved, objected = (np.array([verdict in c for c in critiques]) for verdict in ('<right>', '<wrong>'))
    assert (approved[true].mean() + objected[~true].mean())/2 > .58 # .68 here, .65 over 600 problems


def test_a_critique_matters_to_the_refiner(said):
    "Following a flawless verifier beats having everything approved, and another problem's critique ruins the answer."
    steps = [re.split(';|#### ', t) for t in said['base']]
    helped = [verified(operands(q), tuple(s) if len(s) == 5 else ('',)*5, random.Random(0), 0, 0)[1]
              for q, s in zip(QUESTIONS, steps)]
    approved = [f"{t.partition('####')[0]}<right>#### {extract_answer(t)}" for t in said['base']]
    ways = (helped, approved, helped[1:] + helped[:1])
    followed, kept, shuffled = (accuracy(ask('base', [[user('refiner', question=q, answer=t, critique=c)]
                                                      for q, t, c in zip(QUESTIONS, said['base'], cs)])) for cs in ways)
    assert followed > kept + .08 and followed > shuffled + .2


def test_training_repeats_itself(tmp_path):
    one, other = (train_tiny('base', 5, tmp_path/name, share=.01) for name in 'ab')
    assert (one/'model.safetensors').read_bytes() == (other/'model.safetensors').read_bytes()
    another = train_tiny('base', 6, tmp_path/'c', share=.01)
    assert (one/'model.safetensors').read_bytes() != (another/'model.safetensors').read_bytes()
