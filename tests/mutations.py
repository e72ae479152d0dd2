"""Break one line of mapo at a time and see which test notices: `python tests/mutations.py [WORD ...]`.

Each line is broken in a copy of the working tree, and the tests that are likely to notice are run there. That the
modules are what the notebooks export is not among them: it would notice every edit, and says nothing about what is
computed. A WORD chooses mutations.
"""
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from conftest import SESSION, copied


class Mutation(NamedTuple):
    what:str   # is broken
    module:str
    old:str    # occurs once in it
    new:str
    tests:str  # that are likely to notice


MUTATIONS = [
    Mutation('sign of the NLL term', 'training', 'return loss + self.alpha*nll if', 'return loss - self.alpha*nll if',
             'test_training.py'),
    Mutation('order of a pair', 'pairs', 'chosen=_answers(turns, w), rejected=_answers(turns, l)',
             'chosen=_answers(turns, l), rejected=_answers(turns, w)', 'test_pairs.py'),
    Mutation('pairs of one problem only', 'pairs', "w,l,asked = w.iloc[grid['w']],l.iloc[grid['l']]",
             "w,l,asked = w.iloc[grid['w']],l.iloc[grid['l'][::-1]]", 'test_pairs.py'),
    Mutation('tie of a vote: the first letter wins', 'rewards', "tally.sort_values(['weight', 'draw']",
             "tally.sort_values(['weight', 'answer']", 'test_rewards.py'),
    Mutation('summaries vote', 'rewards', 'turns,place = turns[answering(turns)],', 'turns,place = turns,',
             'test_rewards.py'),
    Mutation('filter of an artifact: its split', 'runs', 'if column in table: table = table[table[column] == value]',
             'if column not in table: table = table[table[column] == value]', 'test_mars_po.py'),
    Mutation('weights in a stage\'s key', 'runs',
             'return dict(model=value.name, fingerprint=fingerprint(value), licence=value.licence)',
             'return dict(model=value.name, licence=value.licence)', 'test_runs.py -k key'),
    Mutation('inputs in a stage\'s key', 'runs', 'inputs=canonical(inputs)) | libraries',
             'inputs=sorted(inputs)) | libraries', 'test_runs.py -k key'),
    Mutation('escaping of a formula', 'agents', "if c.isalnum() or c == ' ' else", "if c.isalnum() or c in ' $' else",
             'test_tables.py'),
    Mutation('agent in a request\'s seed', 'sampling',
             'problem_id, iteration, agent, role, round, list(parent_ids))\n    return int',
             'problem_id, iteration, role, round, list(parent_ids))\n    return int', 'test_sampling.py'),
    Mutation('parents in a request\'s seed', 'sampling', 'agent, role, round, list(parent_ids))\n    return int',
             'agent, role, round)\n    return int', 'test_sampling.py'),
    Mutation('resume of chunks', 'runs', 'if not path.exists():\n                with whole',
             'if True:\n                with whole', 'test_multiagent_ft.py -k killed'),
    Mutation('value propagation: a sum', 'rewards',
             'total,count = total + np.bincount(above, values, size),count + np.bincount(above, minlength=size)',
             'total = total + np.bincount(above, values, size)', 'test_rewards.py'),
    Mutation('interval: seeds are taken as fixed', 'intervals', 'return m,of_seeds.var(-1, ddof=1)/seeds,by_problem,',
             'return m,0*m,by_problem,', 'test_intervals.py'),
    Mutation('interval: problems are taken as fixed', 'intervals', '(np.maximum(by_problem - luck, 0), problems - 1)',
             '(0*by_problem, problems - 1)', 'test_intervals.py'),
    Mutation('interval: luck is counted twice', 'intervals', 'np.maximum(by_problem - luck, 0)',
             'np.maximum(by_problem, 0)', 'test_intervals.py'),
    Mutation('Holm: no step-down', 'intervals', 'np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))',
             'np.maximum.accumulate(p[order] * len(p))', 'test_intervals.py'),
    Mutation('Holm: steps the other way', 'intervals', 'np.arange(len(p), 0, -1)', 'np.arange(1, len(p) + 1)',
             'test_intervals.py'),
    Mutation('reference of a pair: the trained model', 'methods',
             'reference_log_probabilities(model, rows, objective)',
             'reference_log_probabilities(init, rows, objective)', 'test_mars_po.py -k initial_reference'),
]


def caught(mutation, folder):
    "The first test that fails, and what pytest said."
    path = folder/'mapo'/f'{mutation.module}.py'
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        sys.exit(f'mutations: {mutation.what!r} breaks a text that mapo/{mutation.module}.py has '
                 f'{whole.count(mutation.old)} times: mend MUTATIONS')
    path.write_text(whole.replace(mutation.old, mutation.new))
    file, *more = mutation.tests.split()
    done = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', f'tests/{file}',
                           *more], cwd=folder, capture_output=True, text=True)
    path.write_text(whole)
    found = re.search(r'^(?:FAILED|ERROR) tests/(\S+)', done.stdout, re.M)
    return found[1] if found and done.returncode == 1 else '', done.stdout + done.stderr


def main():
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in f'{m.what} {m.module}' for word in sys.argv[1:])]
    survived = 0
    print('| broken | in | noticed by | s |\n|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = copied(Path(folder)/'mapo-copy')
        for m in chosen:
            started = time.monotonic()
            test, said = caught(m, folder)
            survived += not test
            print(f"| {m.what} | `{m.module}` | {f'`{test}`' if test else '**nothing**'} | "
                  f"{time.monotonic()-started:.0f} |", flush=True)
            if not test: print(said[-2000:], file=sys.stderr)
    SESSION.rmdir() # which conftest made
    if survived: sys.exit(f'{survived} of {len(chosen)} mutations are noticed by no test')


if __name__ == '__main__': main()
