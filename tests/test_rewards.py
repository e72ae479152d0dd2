"""Grading and voting where a notebook cell cannot show it: many turns, hostile texts, Parquet."""
import numpy as np
import pandas as pd
import pytest

from mapo import rewards
from mapo.answers import Grader
from mapo.engines import ScriptedScorer
from mapo.rewards import (agrees, answering, canonical_answers, concordance, example_tree, example_turns, flip_labels,
                          grade, order_among_right, propagate, read_answers, reward,
                          reward_table, seeded_draw, show_tree, vote, with_scores)

PROBLEMS = pd.DataFrame(dict(problem_id=['p1', 'p2'], question='?', answer=['42', '1'], kind='number'))


def turns():
    return example_turns({a: {'p1': ['The answer is 42.', 'The answer is 4.'], 'p2': ['The answer is 1.', '']}
                          for a in ('ada', 'bob')})


def test_a_text_is_read_once_however_often_it_occurs(monkeypatch):
    read = []
    monkeypatch.setattr(rewards, 'extract_answer', lambda text, kind: read.append(text) or text[14:-1] or None)
    many = pd.concat([turns().assign(turn_id=lambda t: t.turn_id + f'-{i}') for i in range(50)], ignore_index=True)
    scores = grade(many, PROBLEMS)
    assert len(read) == 4 and len(scores) == 2*len(many)


def test_a_running_grader_stays_open():
    with Grader() as grader:
        assert grade(turns(), PROBLEMS, grader).equals(grade(turns(), PROBLEMS, grader))


def test_the_order_of_turns_changes_no_score():
    shuffled = turns().sample(frac=1, random_state=0)
    one, other = (grade(t, PROBLEMS).sort_values(['turn_id', 'name']).reset_index(drop=True)
                  for t in (turns(), shuffled))
    assert one.equals(other)


@pytest.mark.parametrize('text', ['9**9**9', '('*10_000, '__import__("os").system("false")', '\x00\ud7ff\U0010ffff',
                                  '#### ' + '9'*100_000, None])
def test_hostile_and_missing_texts_are_wrong(text):
    scores = grade(turns().assign(text=text), PROBLEMS)
    assert (scores.value.dropna() == 0).all() and scores.value.notna().sum() == 8


def test_no_turns_give_no_scores():
    assert len(grade(turns()[:0], PROBLEMS)) == 0


def test_scores_and_votes_survive_parquet(tmp_path):
    scores = grade(turns(), PROBLEMS)
    scores.to_parquet(tmp_path/'scores.parquet', index=False)
    again = with_scores(turns(), pd.read_parquet(tmp_path/'scores.parquet'), 'answer', 'correct')
    pd.testing.assert_frame_equal(again, with_scores(turns(), scores, 'answer', 'correct'))
    votes = vote(again, PROBLEMS)
    votes.to_parquet(tmp_path/'votes.parquet', index=False)
    assert agrees(again, pd.read_parquet(tmp_path/'votes.parquet'), PROBLEMS).equals(agrees(again, votes, PROBLEMS))


def test_a_score_of_texts_that_are_all_missing_is_still_a_text():
    scores = grade(turns().assign(text=''), PROBLEMS)
    assert with_scores(turns(), scores, 'answer').answer.isna().all()
    votes = vote(with_scores(turns(), scores, 'answer'), PROBLEMS)
    assert votes.answer.isna().all() and (votes.share == 0).all() and not votes.tie.any()


def test_a_seat_with_many_samples_has_one_vote():
    said = example_turns({'ada': {'p1': ['3']*9}, 'bob': {'p1': ['5']}, 'cid': {'p1': ['5']}})
    votes = vote(said.assign(answer=said.text), PROBLEMS)
    assert votes.answer.tolist() == ['5'] and votes.share[0] == pytest.approx(2/3) and not votes.tie[0]


def test_a_tie_among_losers_is_no_tie():
    said = example_turns({a: {'p1': [t]} for a, t in zip('abcd', '3356')})
    assert not vote(said.assign(answer=said.text), PROBLEMS).tie.any()


def test_no_answer_is_favoured_in_a_tie():
    said = example_turns({agent: {f'p{i}': [text] for i in range(400)} for agent, text in (('ada', '3'), ('bob', '5'))})
    problems = pd.DataFrame(dict(problem_id=[f'p{i}' for i in range(400)], question='?', answer='3', kind='number'))
    votes = vote(said.assign(answer=said.text), problems)
    assert votes.tie.all() and abs((votes.answer == '3').mean() - .5) < .09 # 3.5 standard errors


def test_a_summarizer_does_not_vote():
    said = example_turns({'ada': {'p1': ['3']}, 'bob': {'p1': ['5']}, 'sum': {'p1': ['5']}})
    said['role'] = ['generator', 'generator', 'summarizer']
    assert vote(said.assign(answer=said.text), PROBLEMS).tie.all()


def test_agreement_is_with_the_last_round():
    said = turns().assign(answer='42')
    votes = pd.DataFrame(dict(problem_id=['p1', 'p1', 'p2'], round=[1, 0, 0], answer=['42', '7', '7'], share=1.,
                              tie=False))
    assert agrees(said, votes, PROBLEMS).value.tolist() == [1, 1, 0, 0]*2


def test_draws_do_not_depend_on_their_surroundings_or_the_machine():
    assert seeded_draw(['turn'], 0)[0] == seeded_draw(['a', 'turn'], 0)[1] == 1834726935367752749
    assert len({int(seeded_draw(['turn'], s)[0]) for s in (0, 1, 2**62 - 1, 2**62 - 2)}) == 4


def test_flipping_everything_and_nothing():
    scores = grade(turns(), PROBLEMS)
    correct = scores[scores.name == 'correct'].value.to_numpy()
    assert (flip_labels(scores, 1, 0).value.to_numpy() == 1 - correct).all()
    assert (flip_labels(scores, 0, 0).value.to_numpy() == correct).all()
    few, more = (set(np.flatnonzero(flip_labels(scores, s, 0).value.to_numpy() != correct)) for s in (.25, .5))
    assert few < more


def test_canonical_answers_are_row_by_row():
    said = turns().assign(answer=['1.0', '1', None, '1,000']*2)
    assert canonical_answers(said, PROBLEMS).fillna('none').tolist() == ['1', '1', 'none', '1000']*2


STYLES = {'roots': (['2,3', '3,2', r'\{2,3\}', '5', '5'], '2,3'),
          'half': ([r'\frac{\sqrt2}{2}', r'\dfrac{\sqrt{2}}{2}', r'\frac1{\sqrt2}', '3', '3'], r'\frac{1}{\sqrt{2}}'),
          'five': (['x=5', '5 cm', '5', '6', '6'], '5'),
          'square': (['(x+1)^2', 'x^2+2x+1', '1+2x+x^2', '0', '0'], '(x+1)^2')}

def styled():
    said = example_turns({f'seat {i}': {p: [answers[i]] for p, (answers, _) in STYLES.items()} for i in range(5)})
    return said.assign(answer=said.text), pd.DataFrame(dict(problem_id=[*STYLES], kind='math'))


@pytest.mark.parametrize('order', [0, 1, 2])
def test_a_vote_calls_equal_what_grading_does_in_any_order(order):
    said, problems = styled()
    said = said.sample(frac=1, random_state=order)
    with Grader(n_workers=1) as grader:
        votes = vote(said, problems, order, grader)
        assert votes.set_index('problem_id').answer.to_dict() == {p: winner for p, (_, winner) in STYLES.items()}
        assert votes.share.tolist() == pytest.approx([.6]*4) and not votes.tie.any()
        assert (agrees(said, votes, problems, grader).value.to_numpy() == said.seat.lt(3).to_numpy()).all()
        right = grader.grade(said.problem_id.map(lambda p: STYLES[p][1]), said.answer, 'math')
        assert (right == said.seat.lt(3)).all()


def test_agreement_with_a_vote_that_is_written_otherwise():
    said, problems = styled()
    votes = pd.DataFrame(dict(problem_id=[*STYLES], round=0, answer=['3, 2', r'0.7071067812', 'y=5', None], share=1.,
                              tie=False))
    assert agrees(said, votes, problems).groupby(said.problem_id).value.sum().to_dict() == dict(
        roots=3, half=3, five=3, square=0) # y=5 is 5, and 5 is x=5


def test_numbers_are_compared_without_math_verify(monkeypatch):
    monkeypatch.setattr('mapo.answers._Worker.ask', lambda *_: 1/0)
    said = example_turns({a: {'p1': [t], 'p2': ['7']}
                          for a, t in zip('abcdef', ('0.333333', '1/3', '0.3333333', '12', '12.0', '13'))})
    votes = vote(said.assign(answer=said.text), PROBLEMS)
    assert votes.answer.tolist() == ['1/3', '7'] and votes.share.tolist() == [.5, 1]


class Spy:
    "A scorer that remembers what it was shown."
    model_key = 'spy-1'

    def __init__(self): self.shown = []

    def score(self, conversations):
        self.shown += conversations
        return np.arange(len(conversations), dtype=float)


def test_a_reward_model_is_shown_the_bare_question_and_one_answer_once():
    said, spy = turns(), Spy()
    rewards = reward(pd.concat([said, said.assign(turn_id=lambda t: t.turn_id + '-again')]),
                     PROBLEMS.assign(question=['6*7', '5-4']), spy)
    assert spy.shown == [[dict(role='user', content=q), dict(role='assistant', content=a)] for q, a in
                         [('6*7', 'The answer is 42.'), ('6*7', 'The answer is 4.'), ('5-4', 'The answer is 1.'),
                          ('5-4', '')]]
    assert rewards.value.tolist() == [0, 1, 2, 3]*4 and set(rewards.name) == {'reward'}
    assert set(rewards.scorer_key) == {'spy-1'}
    assert 'ada' not in str(spy.shown) and 'bob' not in str(spy.shown)


@pytest.mark.parametrize('numbers,match', [
    (lambda n: np.full(n, np.nan), "gave nan to turn 'ada-p1-0', and no number to 4 of 4"),
                                           (lambda n: np.array([0, np.inf, 1, 2]), "gave inf to turn 'ada-p1-1'"),
    (lambda n: np.zeros(n), 'the same number, 0, to all 4 answers: it cannot rank them'),
                                           (lambda n: np.zeros((n, 2)), 'shape \\(4, 2\\) for 4 answers'),
    (lambda n: np.arange(n - 1), 'shape \\(3,\\) for 4 answers')])
def test_a_reward_that_cannot_be_used_is_refused_by_name(numbers, match):
    scorer = Spy()
    scorer.score = lambda conversations: numbers(len(conversations))
    with pytest.raises(ValueError, match=f"reward model 'spy-1' gave .*{match}|{match}"):
        reward(turns(), PROBLEMS, scorer)


def test_one_answer_may_have_any_reward_and_no_turns_none():
    one = example_turns({'ada': {'p1': ['x', 'x']}})
    assert reward(one, PROBLEMS, Spy()).value.tolist() == [0, 0]
    scorer = Spy()
    scorer.score = lambda conversations: np.empty(0)
    assert len(reward(turns()[:0], PROBLEMS, scorer)) == 0


def test_concordance_is_the_share_of_pairs_by_the_letter():
    rng = np.random.default_rng(0)
    said = example_turns({'ada': {f'p{i}': [f't{j}' for j in range(rng.integers(1, 7))] for i in range(60)}})
    said = said.assign(good=rng.integers(0, 2, len(said)), reward=rng.integers(0, 3, len(said)).astype(float))
    each, pairs = [], 0
    for _, rows in said.groupby('problem_id'):
        wins = [1. if a > b else .5 if a == b else 0. for a in rows.reward[rows.good == 1]
                for b in rows.reward[rows.good == 0]]
        pairs += len(wins)
        if wins: each.append(np.mean(wins))
    found = concordance(said, 'good')
    assert found['share'] == pytest.approx(np.mean(each)) and (found['problems'], found['pairs']) == (len(each), pairs)
    doubled = pd.concat([said, said.assign(turn_id=said.turn_id + '-again', text=' ' + said.text)])
    assert concordance(doubled, 'good') == found


def test_only_right_answers_are_ordered():
    said = example_turns({'ada': {'p1': list('abcd'), 'p2': list('abcd')}}).assign(
        correct=[1., 1., 0., 0.]*2, good=[1, 0, 0, 1]*2, reward=[2., 1., 3., 0.]*2)
    assert order_among_right(said, 'good')['share'] == 1 and concordance(said, 'good')['share'] == .25
    table = reward_table(said.assign(other=-said.reward), 'good', 'reward',
                         'other').set_index(['reward', 'question']).share
    assert table.to_dict() == {('reward', 'right over wrong'): .5, ('reward', 'good among right'): 1.,
                               ('other', 'right over wrong'): .5, ('other', 'good among right'): 0.}


@pytest.mark.parametrize('strength', [0., 1.5])
@pytest.mark.parametrize('problems', [15, 60])
def test_the_interval_of_the_concordance_covers(strength, problems):
    "600 simulated tests of rewards of known concordance (normal noise, shifted by the target, problems that differ)."
    from scipy.stats import norm
    rng, hits, differing = np.random.default_rng(1), 0, .5
    truth = norm.cdf(strength/np.sqrt(2 + differing**2))
    ids = np.repeat(np.arange(problems), 6)
    said = example_turns({'ada': {f'p{i}': [f't{j}' for j in range(6)] for i in range(problems)}})
    for _ in range(600):
        good = rng.integers(0, 2, len(said))
        value = rng.normal(size=len(said)) + good*(strength + differing*rng.normal(size=problems)[ids])
        found = concordance(said.assign(good=good, reward=value), 'good')
        hits += found['low'] <= truth <= found['high']
    assert .92 < hits/600 < .99


def test_reading_answers_needs_no_gold():
    known = read_answers(turns(), PROBLEMS)
    assert read_answers(turns(), PROBLEMS[['problem_id', 'kind']]).equals(known)
    assert grade(turns(), PROBLEMS)[:len(known)].equals(known)


def random_trees(seed, branching=(3, 3, 3), problems=12):
    "Trees with few distinct texts, a fifth of the branches missing, in shuffled order with a broken index."
    rng, levels, above = np.random.default_rng(seed), [], [(f'p{i}', f'p{i}') for i in range(problems)]
    for level, n in enumerate(branching):
        rows = [dict(turn_id=f'{parent}.{i}', problem_id=problem, parent_ids=[parent] if level else [], round=level,
                     agent=f'level {level}', text=' '*rng.integers(2) + 'ABC'[rng.integers(3)])
                for problem, parent in above for i in range(n) if rng.random() < .8]
        levels, above = levels + rows, [(r['problem_id'], r['turn_id']) for r in rows]
    turns = pd.DataFrame(levels, index=np.zeros(len(levels), int)).sample(frac=1, random_state=seed)
    return turns.assign(correct=np.where(turns['round'] == len(branching)-1, rng.integers(0, 2, len(turns)), np.nan),
                        split='train', purpose='train', iteration=1)


def slowly(turns):
    "Values of trees by the letter of the rules, one merged turn at a time."
    values, last, everyone = {}, turns['round'].max(), [*turns.itertuples()]

    def level(siblings):
        groups = {}
        for t in siblings: groups.setdefault(t.text.strip(), []).append(t)
        for same in groups.values():
            ids = {t.turn_id for t in same}
            children = [c for c in everyone if set(c.parent_ids) & ids]
            level(children)
            worth = [t.correct for t in same] if same[0].round == last else [values[c.turn_id] for c in children] or [0]
            values.update(dict.fromkeys(ids, np.mean(worth)))

    for problem in turns.problem_id.unique(): level([t for t in everyone if t.problem_id == problem and t.round == 0])
    return turns.turn_id.map(values)


@pytest.mark.parametrize('branching', [(3, 3, 3), (4, 2), (5,), (2, 2, 2, 2)])
def test_values_are_what_the_rules_say_on_trees_with_missing_nodes(branching):
    for seed in range(5):
        turns = random_trees(seed, branching)
        np.testing.assert_allclose(propagate(turns).value, slowly(turns))


def test_the_value_of_a_whole_tree_is_the_share_of_its_right_leaves():
    leaves = [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert propagate(example_tree(leaves)).loc['g', 'value'] == pytest.approx(5/9)
    assert propagate(example_tree([[[1, 1], [0, 1]], [[0, 0], [1, 0]]][0])).loc['g', 'value'] == 3/4
    assert propagate(example_tree([1, 0, 0])).loc['g', 'value'] == pytest.approx(1/3)


def test_values_survive_parquet(tmp_path):
    propagate(random_trees(0)).to_parquet(tmp_path/'turns.parquet', index=False)
    turns = pd.read_parquet(tmp_path/'turns.parquet')
    assert propagate(turns.drop(columns='value')).value.equals(turns.value)


def test_no_turns_have_no_values():
    assert len(propagate(random_trees(0)[:0])) == 0


@pytest.mark.parametrize('text', [None, '', '<script>x</script>', '</details><b>', '$x$', 'a\x1b[2Jb', '\u202eabc',
                                  'x'*10_000])
def test_a_tree_shows_any_text_and_runs_none(text):
    shown = show_tree(propagate(example_tree([[1, 0]])).assign(text=text, agent='<i>' + str(text)[:20]))
    html, plain = shown._repr_html_(), str(shown)
    assert '<script' not in html and '<i>' not in html and '<b></b>' not in html and '$' not in html
    assert '\x1b' not in html + plain and '\u202e' not in html + plain
    assert len(plain.splitlines()) == 4 and html.count('<details') == html.count('</details>') == 4


def with_summaries():
    "Turns, and a summary of a right and one of a wrong answer in a seat of their own."
    said = turns()
    summaries = said[:2].assign(turn_id=['sum-0', 'sum-1'], agent='sum', role='summarizer', seat=9)
    return pd.concat([said, summaries], ignore_index=True)


@pytest.mark.parametrize('judge', [
    lambda said: grade(said, PROBLEMS),
    lambda said: read_answers(said, PROBLEMS),
    lambda said: reward(said, PROBLEMS, ScriptedScorer(lambda m: len(m[-1]['content']))),
    lambda said: agrees(said.assign(answer='42'), vote(turns().assign(answer='42'), PROBLEMS), PROBLEMS)],
    ids=['grade', 'read_answers', 'reward', 'agrees'])
def test_a_summary_gets_no_score(judge):
    assert {*judge(with_summaries()).turn_id} == {*turns().turn_id}


def test_a_summary_does_not_vote():
    said = with_summaries()
    votes = vote(said.assign(answer=np.where(answering(said), '42', '4')), PROBLEMS)
    assert [*votes.answer] == ['42', '42'] and (votes.share == 1).all()


def test_a_summary_lacks_no_score_and_other_turns_do():
    said, scores = with_summaries(), grade(with_summaries(), PROBLEMS)
    beside = with_scores(said, scores, 'answer', 'correct').set_index('turn_id')
    assert beside.loc[['sum-0', 'sum-1'], ['answer', 'correct']].isna().all(axis=None)
    assert beside.correct[:-2].notna().all()
    with pytest.raises(ValueError, match="missing for 1 of 10 turns, first 'ada-p1-0'"):
        with_scores(said, scores[scores.turn_id != 'ada-p1-0'], 'correct')


def test_turns_that_do_not_say_their_role_are_refused():
    with pytest.raises(ValueError, match="no column 'role'"): grade(turns().drop(columns='role'), PROBLEMS)
