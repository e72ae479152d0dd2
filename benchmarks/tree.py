"""MALT's trees: CPU-seconds of bookkeeping, values and pairs at 100,000 nodes.

    python benchmarks/tree.py [--nodes 100000] [--out benchmarks/tree.md]

Trees of three generators' answers, three critiques each and three refined answers each, with texts of about 300 bytes
of which some repeat among siblings, are made in memory and shuffled. Then the scores are joined, values are
propagated, labelled, and each role's examples and sibling pairs are built.
"""
import argparse, os, platform, time, zlib
from pathlib import Path

import numpy as np
import pandas as pd

LIMIT = 2. # seconds for 100,000 nodes, from the project's plan
ROLES = ('generator', 'verifier', 'refiner')


def trees(nodes, branching=(3, 3, 3), seed=0):
    "Turns, contexts and grades of whole trees with about `nodes` turns."
    rng = np.random.default_rng(seed)
    letters = ''.join(rng.choice(list('0123456789+-*=() abcdefgh\n'), size=2**16))
    per_tree = sum(np.cumprod(branching))
    parents, levels, contexts = [f'p{i}' for i in range(nodes//per_tree)], [], []
    problems = parents
    for level, n in enumerate(branching):
        ids = [f'{p}.{i}' for p in parents for i in range(n)]
        problems = [p for p in problems for _ in range(n)]
        contexts += [(f'for {p}', [dict(role='user', content=f'{p}: ' + letters[i % 2**15:][:300])])
                     for i, p in enumerate(parents)]
        words = [f'{p} {rng.integers(2*n)} ' for p in parents for _ in range(n)]
        levels.append(pd.DataFrame(dict(turn_id=ids, context_id=[f'for {p}' for p in parents for _ in range(n)],
                                        problem_id=problems, split='train', purpose='train', iteration=1, round=level,
                                        seat=level, agent=ROLES[level], role=ROLES[level],
                                        parent_ids=[[p] if level else [] for p in parents for _ in range(n)],
                                        text=[w + letters[zlib.crc32(w.encode()) % 2**15:][:300] for w in words],
                                        finish_reason='stop', completion_tokens=100, model_key='m')))
        parents = ids
    turns = pd.concat(levels, ignore_index=True).sample(frac=1, random_state=seed, ignore_index=True)
    scores = pd.DataFrame(dict(turn_id=turns.turn_id, name='correct',
                               value=(pd.util.hash_array(turns.text.to_numpy(object)) % 2).astype(float), label=None,
                               scorer_key='gold-1'))
    return turns, pd.DataFrame(contexts, columns=['context_id', 'messages']), scores


def measure(nodes):
    "CPU-seconds of each part, and what came out."
    from mapo.pairs import Selection, label_values, own_pairs, own_positives
    from mapo.rewards import propagate, with_scores
    turns, contexts, scores = trees(nodes)
    every, spent, start = Selection(score='positive', by='context_id', n_positives=0, n_negatives=0,
                                    n_pairs=0), {}, time.process_time()

    def done(part):
        nonlocal start
        spent[part],start = time.process_time() - start,time.process_time()

    turns = with_scores(turns, scores, 'correct')
    done('join grades')
    turns = propagate(turns)
    done('values')
    turns = label_values(turns)
    by_role = {role: turns[turns.role == role] for role in ROLES}
    done('labels')
    examples = [len(own_positives(by_role[role], contexts, role, every).table) for role in ROLES]
    done('examples of three roles')
    pairs = [len(own_pairs(by_role[role], contexts, role, every).table) for role in ROLES]
    done('sibling pairs of three roles')
    return dict(nodes=len(turns), spent=spent, total=sum(spent.values()), examples=examples, pairs=pairs)


def report(r, command):
    "The measurement as Markdown."
    rows = [f'| {part} | {seconds:.2f} s |' for part, seconds in r['spent'].items()]
    by_role = lambda counts: ', '.join(f'{n:,} ({role})' for n, role in zip(counts, ROLES))
    return '\n'.join(['# Values and pairs of trees', '', f'`{command}`', '',
                      f"{r['nodes']:,} nodes in trees of 3 x 3 x 3, as MALT samples them. CPU-seconds of one process.",
                      '', '| part | time |', '|---|--:|', *rows, f"| **all** | **{r['total']:.2f} s** |", '',
                      f"Limit for 100,000 nodes, {LIMIT:.0f} s: {'kept' if r['total'] < LIMIT else 'BROKEN'}. "
                      f"Examples: {by_role(r['examples'])}. All sibling pairs: {by_role(r['pairs'])}.", '',
                      f'Python {platform.python_version()}, pandas {pd.__version__}, {os.cpu_count()} cores, '
                      f'{platform.machine()}, load average {os.getloadavg()[0]:.1f} at the end.'])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--nodes', type=int, default=100_000)
    parser.add_argument('--out', type=Path, help='write the result here too, as Markdown')
    args = parser.parse_args()
    measure(2000) # imports, and pandas' first use of everything
    result = report(measure(args.nodes),
                    'python benchmarks/tree.py' + f' --nodes {args.nodes}'*(args.nodes != 100_000)
                    + ' --out benchmarks/tree.md'*bool(args.out))
    print(result)
    if args.out: args.out.write_text(result + '\n')


if __name__ == '__main__': main()
