"""Coverage of intervals and level of tests over seeds and problems, by simulation of equal arms.

    python benchmarks/coverage.py [--runs 4000] [--out benchmarks/coverage.md]

Two equal arms answer the same problems under the same seeds. On the scale of log-odds an answer's chance is the sum
of what makes a problem hard for all, what makes it hard for an arm, what a seed does to an arm, and the luck of an
arm's seed with a problem. The spreads are those of the published records. From each simulated run come the interval
of one arm's accuracy, which ought to hold its true value, and the test of the difference, which ought to be
significant in 5 % of runs; the interval of the difference, which is the same test, holds zero in all others.
"""
import argparse, platform, time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from mapo.intervals import cluster_interval, paired, variation

KINDS = { # answers to a problem, and spreads in log-odds: problems, an arm's problems, luck
    'one answer, as of a vote': (1, 1., .5, .7),
    'six answers': (6, 1., .5, .5),
    'six answers, problems very unlike': (6, 2., .3, .3)}
SEEDS = (0, .05, .2) # spread of what a seed does; at an accuracy of .5 a quarter of it, in accuracy
GRID = dict(p=(.5, .9, .99), seeds=(3, 5), problems=(200, 400), between=SEEDS, kind=tuple(KINDS))


def intercept(p, spread):
    "Log-odds whose mean chance is `p` where they spread by `spread`."
    z, w = np.polynomial.hermite_e.hermegauss(80)
    return optimize.brentq(lambda m: (w*special.expit(m + spread*z)).sum()/w.sum() - p, -30, 30)


def answers(rng, runs, p, seeds, problems, between, kind):
    "Share right of each problem: (runs, 2 arms, seeds, problems)."
    n, hard, own, luck = KINDS[kind]
    draw = lambda spread, *shape: spread*rng.standard_normal((runs, *shape), dtype=np.float32)
    odds = (draw(hard, 1, 1, problems) + draw(own, 2, 1, problems) + draw(between, 2, seeds, 1)
            + draw(luck, 2, seeds, problems))
    chance = special.expit(odds + np.float32(intercept(p, np.sqrt(hard**2 + own**2 + between**2 + luck**2))))
    return (rng.random(chance.shape, dtype=np.float32) < chance).astype(float) if n == 1 else rng.binomial(n, chance)/n


def others(d):
    "How often other rules find a difference significant: t over seeds or problems, ours with Satterthwaite's weights."
    seeds, problems = d.shape[-2:]
    m, a, b, e = variation(d)
    rest = np.maximum(b - e, 0)
    squares = (a + rest)**2/np.maximum(a**2/(seeds - 1) + rest**2/(problems - 1), 1e-300)
    rules = dict(over_seeds=(a, seeds - 1), over_problems=(b, problems - 1), satterthwaite=(a + rest, squares))
    return {name: (abs(m) > stats.t.ppf(.975, df)*np.sqrt(v)).mean() for name, (v, df) in rules.items()}


def measure(rng, runs, **setting):
    "One row of the result."
    x = answers(rng, runs, **setting)
    _, _, low, high = cluster_interval(x[:, 0])
    d = x[:, 0] - x[:, 1]
    return dict(setting, coverage=((low <= setting['p']) & (setting['p'] <= high)).mean(),
                level=(paired(d).p < .05).mean(), **others(d))


def line(group):
    span = lambda c: f'{100*group[c].mean():.1f} ({100*group[c].min():.1f}-{100*group[c].max():.1f})'
    return ' | '.join(span(c) for c in ('coverage', 'level', 'over_seeds', 'over_problems', 'satterthwaite'))


def page(table, runs, cpu):
    "The result as Markdown."
    rows = [f'| {p:g} | {seeds} | {problems} | {line(group)} |' for (p, seeds, problems),
            group in table.groupby(['p', 'seeds', 'problems'])]
    error = lambda share: 100*np.sqrt(share*(1 - share)/runs)
    wide, narrow = table[table.coverage > .97 + 2*error(.97)/100], table[table.coverage < .93]
    far = table[(table.level - .05).abs() > .01 + 2*error(.05)/100]
    def named(rows, what):
        cells = rows.groupby(['p', 'seeds', 'problems'])[what].agg(['min', 'max', 'size'])
        return '; '.join(f'p = {p:g}, {seeds} seeds, {problems} problems: {100*r["min"]:.1f}-{100*r["max"]:.1f} in '
                         f'{r["size"]:.0f} of {len(table)//12} settings'
                         for (p, seeds, problems), r in cells.iterrows()) or 'nowhere'
    return f'''# Coverage over seeds and problems

`python benchmarks/coverage.py --out benchmarks/coverage.md`

Two equal arms, {runs:,} simulated runs in each of {len(table)} settings: {len(SEEDS)} spreads between seeds \
({", ".join(f"{s:g}" for s in SEEDS)} in log-odds) times {len(KINDS)} kinds of answers ({"; ".join(KINDS)}). In each \
cell the mean over these {len(SEEDS)*len(KINDS)} settings and, in brackets, the least and the most, in percent. One \
setting's coverage is known to ±{error(.95):.1f}, its level likewise (one standard error), so the least and the most \
of nine lie some {1.5*error(.95):.1f} further out than the true ones.

**Coverage** is how often the 95 % interval of an arm's accuracy holds the true value; **level**, how often equal arms \
differ significantly at 5 %. Both by the suite's model (`mapo.intervals`). Beside it, the level of other rules on the \
same differences: Student's t over seeds' means, Student's t over problems' means, and the suite's variance with \
Satterthwaite's degrees of freedom.

| p | seeds | problems | **coverage** | **level** | t over seeds | t over problems | Satterthwaite |
|--:|--:|--:|--:|--:|--:|--:|--:|
''' + '\n'.join(rows) + f'''

Coverage above 97 % (by more than two standard errors): {named(wide, 'coverage')}. Below 93 %: \
{named(narrow, 'coverage')}. Level outside 4-6 % (by more than two standard errors): {named(far, 'level')}.

{cpu:.0f} CPU-seconds of one thread. Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}.
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=4000, help='simulated runs of a setting')
    parser.add_argument('--out', help='where to write the page, such as benchmarks/coverage.md; none: print it')
    args = parser.parse_args()
    rng, begun = np.random.default_rng(0), time.process_time()
    table = pd.DataFrame([measure(rng, args.runs, **dict(zip(GRID, values))) for values in product(*GRID.values())])
    text = page(table, args.runs, time.process_time() - begun)
    Path(args.out).write_text(text, encoding='utf-8') if args.out else print(text)


if __name__ == '__main__': main()
