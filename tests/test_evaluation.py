"""From graded answers to accuracies and differences: nothing is lost, repeated or favoured."""
import numpy as np
import pandas as pd
import pytest

from mapo.evaluation import (accuracy, check_rows, compact, compare, compare_checkpoints, differences, majority,
                             pass_at_k, pool)
from mapo.intervals import mcnemar, paired


def test_pass_at_k_is_unbiased_and_matches_the_product():
    rng = np.random.default_rng(9)
    c = rng.binomial(10, .3, 40_000)
    assert abs(pass_at_k(10, c, 4).mean() - (1 - .7**4)) < .004
    for n, right, k in [(16, 3, 8), (200, 2, 100), (5, 5, 1), (5, 0, 5)]:
        product = 1 - np.prod([1 - k/i for i in range(n - right + 1, n + 1)]) if n - right >= k else 1.
        assert np.isclose(pass_at_k(n, right, k), product)


def test_accuracy_is_the_mean_and_a_lost_problem_is_refused():
    rng = np.random.default_rng(10)
    keys = pd.MultiIndex.from_product([['base'], [0, 1], [0], ['a', 'b', 'c'], [f'p{i:03}' for i in range(50)],
                                       range(4)],
                                      names=['arm', 'seed', 'iteration', 'agent', 'problem_id', 'sample'])
    table = keys.to_frame(index=False).assign(correct=rng.binomial(1, .6, len(keys)).astype(float))
    rows = compact(table.sample(frac=1, random_state=0))
    assert rows.equals(compact(table))
    assert np.isclose(accuracy(rows, by=('arm', 'iteration')).accuracy[0], table.correct.mean())
    with pytest.raises(ValueError, match='averaged'): accuracy(rows.drop(index=7), by=('arm', 'iteration'))
    with pytest.raises(ValueError, match='seeds'):
        compare(pd.concat([rows, rows[rows.seed == 0].assign(arm='other')]), [('base', 'other')])


def test_majority_ignores_row_order_and_survives_odd_labels():
    rng = np.random.default_rng(11)
    table = pd.DataFrame(dict(problem_id=rng.integers(0, 300, 6000).astype(str),
                              answer=rng.choice(['1', '2', '\\frac{1}{2}', 'ü', '']  + [None], 6000)))
    table = table.assign(arm='base', seed=0, iteration=0, agent='a', correct=(table.answer == '1').astype(float))
    one, two = majority(table), majority(table.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(one, two)
    assert set(one.maj) == {0., 1.}


def test_no_answer_is_favoured_where_several_are_as_frequent():
    said = pd.DataFrame([dict(arm='base', seed=0, iteration=0, agent='a', problem_id=f'p{i}', answer=answer,
                              correct=float(answer == '1')) for i in range(400) for answer in '12'])
    drawn = majority(said)
    assert drawn.tie.all() and abs(drawn.maj.mean() - .5) < .09 # 3.5 standard errors
    assert (drawn.maj != majority(said, seed=1).maj).mean() > .3


@pytest.fixture(scope='module')
def rows():
    rng = np.random.default_rng(15)
    keys = pd.MultiIndex.from_product([['base', 'mars_po'], range(5), ['a', 'b', 'c'], [f'p{i:03}' for i in range(40)]],
                                      names=['arm', 'seed', 'agent', 'problem_id']).to_frame(index=False)
    return keys.assign(iteration=(keys.arm == 'mars_po')*3, n=4, c=rng.binomial(4, .5, len(keys)),
                       greedy=rng.binomial(1, .5, len(keys)).astype(float))


def test_a_comparison_is_of_seeds_and_problems(rows):
    means = rows.assign(share=rows.c/4).pivot_table(index=['seed', 'problem_id'], columns='arm', values='share')
    expected = paired((means['mars_po'] - means['base']).unstack().to_numpy())
    table = compare(rows.sample(frac=1, random_state=0), [('mars_po', 'base')])
    assert np.allclose(table[['difference', 'p', 'low', 'high']],
                       expected[['difference', 'p', 'low', 'high']]) and table.scope[0] == '5 seeds'


def test_rows_that_repeat_are_refused_wherever_they_are_read(rows):
    twice = pd.concat([rows, rows[(rows.seed == 1) & (rows.arm == 'base')]])
    for read in (check_rows, pool, accuracy, lambda r: compare(r, [('mars_po', 'base')]),
                 lambda r: compare_checkpoints(r, [('mars_po', 'base')]), lambda r: differences(r, 'base', 'mars_po')):
        with pytest.raises(ValueError, match="120 compact rows are there twice .first: arm 'base', "
                                             "seed 1, iteration 0, agent 'a', problem_id 'p000'"):
            read(twice)


def test_checkpoints_are_compared_seed_by_seed(rows):
    table = compare_checkpoints(rows, [('mars_po', 'base')])
    assert [*table.seed] == [*range(5)] and {*table.scope} == {'these checkpoints only'}
    assert np.allclose(table.difference, differences(rows, 'mars_po', 'base').mean(axis=1))
    most = rows[rows.seed == 2].groupby(['arm', 'problem_id']).greedy.sum().unstack('arm') >= 2
    only = (most.mars_po & ~most.base).sum(), (most.base & ~most.mars_po).sum()
    assert (table.only_a[2], table.only_b[2]) == only
    assert np.isclose(table.p[2], mcnemar(most.mars_po, most.base)[2])
