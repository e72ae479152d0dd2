"""Intervals and tests keep their promises: measured by simulation, each with the simulation's own error."""
import importlib.util

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import REPO
from mapo.intervals import cluster_interval, holm, mcnemar, mean_interval, paired, paired_bootstrap, variation, wilson

runs = 4000  # a coverage of 95 % is measured to +-.0034 (one standard error), a level of 5 % likewise


def answers(rng, size, p, alike, n=8):
    "Share right of n answers per problem, shape (..., problems); `alike` is the correlation within a problem."
    q = np.full(size, p) if alike == 0 else rng.beta(p*(1/alike - 1), (1 - p)*(1/alike - 1), size)
    return rng.binomial(n, q)/n


@pytest.mark.parametrize('problems', [500, 2000])
@pytest.mark.parametrize('alike', [0, .1, .3, .6, .9])
@pytest.mark.parametrize('p', [.5, .99])
def test_95_percent_intervals_cover_93_to_97_percent(p, alike, problems):
    rng = np.random.default_rng([problems, int(alike*10), int(p*100)])
    covered = 0
    for _ in range(4):
        m, se, low, high = cluster_interval(answers(rng, (runs//4, 1, problems), p, alike))
        covered += ((low <= p) & (p <= high)).sum()
    assert .93 <= covered/runs <= .97


@pytest.mark.parametrize('p', [.5, .99])
def test_fewer_problems_err_on_the_wide_side(p):
    rng = np.random.default_rng(1)
    for alike in (0, .1, .3, .6, .9):
        m, se, low, high = cluster_interval(answers(rng, (runs, 1, 200), p, alike))
        assert .935 <= ((low <= p) & (p <= high)).mean() <= .995


def test_intervals_over_seeds_and_problems_cover():
    rng = np.random.default_rng(2)
    seed_effect, problem_effect = rng.normal(0, .04, (2000, 5, 1)), rng.normal(0, .15, (2000, 1, 300))
    q = np.clip(.6 + seed_effect + problem_effect + rng.normal(0, .1, (2000, 5, 300)), 0, 1)
    m, se, low, high = cluster_interval(rng.binomial(8, q)/8)
    assert .93 <= ((low <= .6) & (.6 <= high)).mean() <= .97


def teams(rng, p, runs=4000):
    """Accuracy per problem of two equal arms: (runs, arms, 5 seeds, 256 problems), means over 3 agents and 4 samples.

    Problems are hard for all, checkpoints lucky on all problems.
    """
    hard = 1 + .8*rng.uniform(-1, 1, (runs, 1, 1, 1, 256)) if p == .5 else rng.gamma(.5, 2, (runs, 1, 1, 1, 256))
    luck = rng.uniform(.85, 1.15, (runs, 2, 5, 3, 1))  # of an arm's, a seed's and an agent's training
    return 1 - rng.binomial(4, np.clip((1 - p)*hard*luck, 0, 1)).mean(3)/4


@pytest.mark.parametrize('p', [.5, .99])
def test_five_seeds_of_three_agents_on_256_problems(p):
    rng, covered, level, by_z = np.random.default_rng(12), [], [], []
    for _ in range(8):
        x = teams(rng, p, runs//8)
        m, se, low, high = cluster_interval(x[:, 0])
        d = x[:, 0] - x[:, 1]
        covered += [(low <= p) & (p <= high)]
        level += [paired(d).p < .05]
        by_z += [abs(d.mean((1, 2))) > 1.96*stats.sem(d.mean(2), axis=1)]
    assert .93 <= np.mean(covered) <= (.97 if p == .5 else .995)  # few rare errors: on the wide side, as for one seed
    assert abs(np.mean(level) - .05) < .0105
    assert np.mean(by_z) > .09  # the same check tells a normal quantile from Student's


def test_the_checks_above_can_fail():
    rng = np.random.default_rng(13)
    x = answers(rng, (runs, 500), .5, .3)
    low, high = wilson(8*x.sum(-1), 8*500)
    assert ((low <= .5) & (.5 <= high)).mean() < .9  # eight answers to a problem taken for eight problems
    d = np.subtract(*teams(rng, .5, 500).swapaxes(0, 1)).reshape(500, -1)
    # problems of five seeds taken for independent ones
    assert (stats.ttest_1samp(d, 0, axis=-1).pvalue < .05).mean() > .2
    family = np.array([p.min() < .05 for p in rng.uniform(size=(4000, 5))])
    assert family.mean() > .15  # five comparisons uncorrected


@pytest.fixture(scope='module')
def simulated():
    "The settings of benchmarks/coverage.py with what they measure."
    spec = importlib.util.spec_from_file_location('coverage_of_intervals', REPO/'benchmarks'/'coverage.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng, few = np.random.default_rng(20), dict(problems=200, between=.2, kind='six answers')
    return pd.DataFrame([module.measure(rng, 1500, p=p, seeds=seeds, **few) for p in (.5, .9, .99) for seeds in (3, 5)])


def test_intervals_and_tests_take_seeds_and_problems(simulated):
    assert simulated.coverage.between(.93 - .012, .99).all()
    assert simulated.coverage[simulated.p < .99].max() <= .97 + .012  # two standard errors
    assert simulated.level.between(.04 - .012, .06 + .012).all() and abs(simulated.level.mean() - .05) < .01
    assert (simulated.over_problems > .09).all()  # the same check tells that seeds were forgotten


def test_problems_are_not_forgotten_where_they_decide():
    "Two arms that differ by problem, not by seed: t over seeds alone is significant in a third of runs."
    rng = np.random.default_rng(21)
    d = rng.normal(0, .35, (3000, 1, 240)) + rng.normal(0, .12, (3000, 5, 240))
    assert abs((paired(d).p < .05).mean() - .05) < .012
    assert (abs(d.mean((1, 2))) > 2.776*stats.sem(d.mean(2), axis=1)).mean() > .5


def test_the_parts_are_those_of_an_analysis_of_variance():
    "Sums of squares by the textbook's short-cut formulas."
    x = np.random.default_rng(22).normal(size=(4, 7)) + np.arange(4)[:, None]/3
    total = (x**2).sum() - x.sum()**2/28
    seeds = (x.sum(1)**2).sum()/7 - x.sum()**2/28
    problems = (x.sum(0)**2).sum()/4 - x.sum()**2/28
    expected = seeds/3/28, problems/6/28, (total - seeds - problems)/18/28
    assert np.allclose(variation(x), (x.mean(), *expected))
    assert np.allclose(variation(np.stack([x, 2*x]))[3], [expected[2], 4*expected[2]])


def test_seeds_alone_are_students_test_on_their_means():
    "Where problems add nothing beyond luck the degrees of freedom are those of seeds; with one seed those of problems."
    luck = np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1.]])
    d = np.array([[.1], [.3], [.4]]) + luck
    expected = stats.ttest_1samp(d.mean(1), 0)
    found = paired(d).iloc[0]
    assert np.allclose(found[['p', 'low', 'high']].astype(float),
                       [expected.pvalue, *expected.confidence_interval()]) and found.scope == '3 seeds'
    assert np.isclose(paired(d[:1]).p[0], stats.ttest_1samp(d[0], 0).pvalue)


def test_seeds_that_share_their_base_agents_promise_too_much():
    """What is known of the t interval's one assumption.

    Of five seeds two share what they began with, as a share of the variance between seeds.
    """
    rng, level = np.random.default_rng(14), {}
    for share in (0, .5, 1):
        base, own = rng.normal(0, share**.5, (20_000, 4)), rng.normal(0, (1 - share)**.5, (20_000, 5))
        level[share] = (paired((base[:, [0, 0, 1, 2, 3]] + own)[..., None]*[1., 1.]).p < .05).mean()
    assert abs(level[0] - .05) < .005 and .06 < level[.5] < .085 and .09 < level[1] < .12


@pytest.mark.parametrize('p', [.5, .99])
def test_wilson_covers_and_equals_scipy(p):
    k = np.random.default_rng(3).binomial(2000, p, 20_000)
    low, high = wilson(k, 2000)
    assert .93 <= ((low <= p) & (p <= high)).mean() <= .97
    for k, n in [(0, 10), (3, 10), (10, 10), (1319, 1319)]:
        assert np.allclose(wilson(k, n), stats.binomtest(k, n).proportion_ci(method='wilson'))


def test_equal_arms_over_seeds_differ_in_5_percent():
    rng = np.random.default_rng(4)
    d = rng.normal(0, .03, (runs, 5, 1)) + rng.normal(0, .3, (runs, 5, 100))
    assert abs((paired(d).p < .05).mean() - .05) < .0105  # 3 standard errors


@pytest.mark.parametrize('p', [.5, .99])
def test_equal_checkpoints_differ_in_5_percent(p):
    rng = np.random.default_rng(5)
    q = np.full((runs, 500), p) if p == .99 else rng.beta(1, 1, (runs, 500))
    d = (rng.binomial(8, q) - rng.binomial(8, q))/8
    assert abs((paired(d[:, None]).p < .05).mean() - .05) < .0105


def test_mcnemar_on_equal_checkpoints():
    rng = np.random.default_rng(6)
    q = rng.beta(1, 1, (6000, 400))
    level = (mcnemar(rng.binomial(1, q), rng.binomial(1, q))[2] < .05).mean()
    assert abs(level - .05) < .01
    assert np.isclose(mcnemar([1]*9 + [0]*3, [0]*9 + [1]*3)[2],
                      stats.binomtest(3, 12).pvalue - stats.binom.pmf(3, 12, .5))


def test_bootstrap_covers():
    rng = np.random.default_rng(7)
    q = rng.beta(2, 1, (600, 150))
    d = (rng.binomial(6, q) - rng.binomial(6, q))/6
    hits = [b.low[0] <= 0 <= b.high[0]
            for b in (paired_bootstrap(x[None], resamples=500, seed=i) for i, x in enumerate(d))]
    assert .92 <= np.mean(hits) <= .98  # 600 runs: one standard error is .009
    same = paired_bootstrap(np.full((2, 20), .25))
    assert same.low[0] == same.high[0] == .25


def test_holm_keeps_the_family_error():
    rng = np.random.default_rng(8)
    family = np.array([holm(p).min() < .05 for p in rng.uniform(size=(10_000, 5))])
    assert abs(family.mean() - .05) < .0066  # 3 standard errors


def test_holm_steps_down():
    "By hand: the smallest p-value times 4, the next times 3, and so on; never less than the one before, never above 1."
    assert np.allclose(holm([.03, .005, .04, .015]), [.06, .02, .06, .045])
    assert np.allclose(holm([.6, .9]), [1, 1])


def test_intervals_of_skewed_values_cover_the_mean():
    "Student's interval on skewed values, as NLL and KL are."
    draw = np.random.default_rng(0)
    inside = [low <= 1 <= high for _, _, low, high in (mean_interval(draw.gamma(4, 1/4, 100)) for _ in range(700))]
    assert .925 < np.mean(inside) < .975
