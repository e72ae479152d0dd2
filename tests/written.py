"Compact rows, records and texts written for the tests of tables, figures and records."
import numpy as np
import pandas as pd
import pytest

from mapo.experiment import drawable
from mapo.malt import MALT
from mapo.mars_po import MARS_PO
from mapo.multiagent_ft import MULTIAGENT_FT
from mapo.record import save_record
from mapo.tables import know_arms

for experiment in (MARS_PO, MULTIAGENT_FT, MALT): know_arms([arm.drawn() for arm in experiment.arms])

manifest = dict(run='0a1b2c3d', command='mapo run mars_po', arms=[arm.drawn() for arm in MARS_PO.arms], commit='f00',
                parameters={'alpha': .1}, hardware='a test',
                comparisons=[['mars_po', 'dpo']], seeds_vary='A seed varies the draw.',
                claims=[dict(claim='better', paper='none', refuted_if='worse', tests=[['mars_po', 'dpo']])])


def team(arm, levels, seeds=(0, 1), problems=60, greedy=True):
    "Compact rows; levels[iteration][agent] is the expected accuracy."
    rng = np.random.default_rng(abs(hash_of(arm)))
    return pd.DataFrame([dict(arm=arm, seed=s, iteration=t, agent=agent, problem_id=f'p{i:02}', n=8,
                              c=int(rng.binomial(8, p)), greedy=float(rng.random() < p) if greedy else np.nan)
                         for s in seeds for t, agents in levels.items() for agent, p in agents.items()
                         for i in range(problems)])


def hash_of(text): return sum(map(ord, text))


def teams(levels, seeds=(0, 1), problems=60):
    "Compact rows of teams that answer together; levels[arm][iteration] is the expected accuracy."
    return pd.concat([team(arm, {t: dict(team=p) for t, p in line.items()}, seeds, problems, greedy=False)
                      for arm, line in levels.items()], ignore_index=True)


def figures(experiment, rows):
    "What a manifest says of figures."
    return dict(figures=drawable(experiment.figures, set(rows.arm)))


hostile = ['<script>alert(1)</script>', '</pre></div><img src=x onerror=alert(1)>', '&lt;script&gt;',
           '**bold** _it_ `code`\n\n# title\n\n- item', '$x^2$ \\(y\\) $$z$$', '| a | b |\n|---|---|',
           '\x1b[2J\x1b[31mred', '\u202egnp.exe', '\x00\x07', ']]>', '<!--', 'ok\r\nline']


@pytest.fixture(scope='session')
def rows():
    return pd.concat([team('base', {0: dict(a=.5, b=.6)}), team('dpo', {1: dict(a=.7, b=.7), 2: dict(a=.6, b=.35)}),
                      team('mars_po', {1: dict(a=.7, b=.7), 2: dict(a=.8, b=.85)})], ignore_index=True)


@pytest.fixture(scope='session')
def costs():
    return pd.DataFrame([dict(arm=a, seed=s, tokens_sampled=1000, tokens_trained=500*s, updates=10)
                         for a in ('dpo', 'mars_po') for s in (0, 1)])


@pytest.fixture(scope='session')
def record(rows, costs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('record')
    save_record(folder, rows, costs, manifest)
    return folder


@pytest.fixture(scope='session')
def everything():
    "All arms of the recorded run of Mars-PO: two teams, and an arm of one iteration."
    mars, rng, one, two = ([a.name for a in MARS_PO.arms], np.random.default_rng(0),
                           dict(borrows=.5, carries=.6, products=.55), {'same-0': .4, 'same-1': .4, 'same-2': .4})
    grow = lambda agents, by: {a: p + by for a, p in agents.items()}
    rows = []
    for arm in mars:
        agents, gain = (two if arm.endswith('_same') else one), rng.uniform(.02, .3)
        rows.append(team(arm, {0: agents} if arm.startswith('base') else {1: grow(agents, gain)}
                         if arm.endswith('one_iteration') else {t: grow(agents, gain*t/3) for t in (1, 2, 3)},
                         seeds=range(3), problems=40))
    rows = pd.concat(rows, ignore_index=True)
    trained = [a for a in mars if not a.startswith('base')]
    costs = pd.DataFrame([dict(arm=a, seed=s, tokens_sampled=1000, tokens_trained=500, updates=10) for a in trained
                          for s in range(3)])
    log = pd.DataFrame([dict(arm=a, iteration=1 + i//10, step=i, chosen=-1. - i, rejected=-3. - 2*i, margin=.01*i)
                        for a in trained if 'po' in a for i in range(30)])
    rates = pd.DataFrame([dict(arm=a, learning_rate=r, accuracy=p, low=p - .03, high=p + .03, seeds=1, problems=256,
                               run='r') for a in trained for r, p in ((1e-5, .6), (3e-5, .61), (1e-4, .4))])
    chosen = pd.DataFrame([dict(arm=a, seed=s, iteration=1, source_agent=x, candidates=50, selected=20 + s,
                                candidate_tokens=20., selected_tokens=np.nan if x == 'same-0' else 21. + s)
                           for a in trained for s in range(3) for x in (two if a.endswith('_same') else one)])
    return dict(rows=rows, costs=costs, training=log, rates=rates, selection=chosen)


@pytest.fixture(scope='session')
def debates():
    "Every arm of Multiagent Finetuning, with what was measured beside accuracy."
    rng = np.random.default_rng(0)
    untrained = [arm.name for arm in MULTIAGENT_FT.arms if not arm.trained]
    trained = [arm.name for arm in MULTIAGENT_FT.arms if arm.trained]
    assert {'multiagent_ft', 'majority_ft_nine'} < {*trained}
    rows = teams({a: {0: .5 + .01*i} for i, a in enumerate(untrained)}
                 | {a: {t: .6 + .01*t for t in ((1,) if '_five' in a or 'dpo' in a else (1, 2, 3))} for a in trained})
    last = rows.groupby('arm').iteration.max()
    diversity = pd.DataFrame([dict(arm=a, seed=s, iteration=t, measure=m, round=r, mean=v + .02*rng.normal(),
                                   low=v - .1, high=v + .1, se=.02, problems=60)
                              for a in last.index for t in (range(1, last[a] + 1) if last[a] else [0]) for s in (0, 1)
                              for m, r, v in (('consensus', 0, .6), ('consensus', 1, .8), ('dissimilarity', 1, .4),
                                              ('nll', 1, .5), ('kl', 1, .2), ('kl_to_base', 1, .3))])
    readouts = pd.DataFrame([dict(arm=a, iteration=t, readout=way, accuracy=.5 + .1*k, low=.45 + .1*k, high=.55 + .1*k,
                                  seeds=2, problems=60) for a, t in last.items()
                             for k, way in enumerate(('alone', 'debate', 'vote'))])
    return dict(rows=rows, diversity=diversity, readouts=readouts)


@pytest.fixture(scope='session')
def trees():
    "Every arm of MALT, with what was measured beside accuracy."
    levels = {a: {0: .5} for a in ('sa', 'sa_vote', 'sa_vote_nine', 'ma', 'ma_vote', 'ma_shuffled',
                                   'debate')} | {arm.name: {1: .6} for arm in MALT.arms if arm.trained and arm.label}
    flips = pd.DataFrame([
        dict(arm=a, iteration=max(t), flip=f, share=v, low=v - .02, high=v + .02) for a, t in levels.items()
        for f, v in (('wrong to right', .1), ('right to right', .5), ('wrong to wrong', .37), ('right to wrong', .03))])
    readouts = pd.DataFrame([dict(arm=a, iteration=max(t), readout=way, accuracy=.5 + .04*k, low=.45 + .04*k,
                                  high=.55 + .04*k, seeds=2, problems=60) for a, t in levels.items()
                             for k, way in enumerate(('vote', 'after verifier', 'after refiner', 'after generator'))])
    sweep = pd.DataFrame([dict(setting=n, value=v, arm=a, accuracy=.6, low=.55, high=.65)
                          for a in ('malt', 'malt_one', 'star_ma') for n, values in (
        ('branching', (2, 3, 4, 5)), ('threshold', (.3, .5, .7)), ('votes', (1, 3, 9))) for v in values])
    return dict(rows=teams(levels), flips=flips, readouts=readouts, sweep=sweep)
