"""Grading: mapo against plain math-verify, side by side in one run.

    python benchmarks/grading.py [SAMPLES.jsonl] [--repeats 3] [--out benchmarks/grading.md]

Verdicts are compared with a careful teacher's, whose cases are committed (tests/free_answers.py), and speed on
simulated answers to GSM8K's and MATH-500's test sets, on college-level matrices, and on SAMPLES.jsonl, if given: what
a model wrote, one object a line with `gold`, `text` and `kind` (`number`, `math` or `choice`). The test sets are read
from the folder MAPO_SHARED_DATA or ../shared/data beside the repository; without it, what needs them is left out, and
it is said.

Each measurement is a process of its own (`--only mapo [--warm] SAMPLES.jsonl`), so that none profits from what another
left in a cache. It imports what it needs and nothing else, and grades the samples.
"""
import argparse, json, logging, os, resource, statistics, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('MAPO_SHARED_DATA', REPO/'../shared/data'))
N_SAMPLES, N_PROBLEMS = 8, 500 # texts a problem, problems of each benchmark


def rewritten(rng, answer):
    "A right answer as models write it: as it stands more often than not, else in another writing of the same value."
    others = [answer.replace(r'\frac', r'\dfrac'), answer.replace(' ', ''),
              answer.replace(',', ', ') if '(' in answer else answer]
    if answer.isdigit(): others += [f'{answer}.0', f'{int(answer):,}', rf'\${answer}', rf'{answer} \text{{ units}}']
    return rng.choice([answer, others[rng.integers(len(others))]], p=[.7, .3])


def mistakes(rng, answer, others):
    "Wrong answers to one problem: neighbours and multiples of a number, a digit changed, other problems' answers."
    alike = [a for a in others if a.lstrip('-').isdigit() == answer.lstrip('-').isdigit()]
    found = [str(alike[i]) for i in rng.integers(len(alike), size=4)]
    if answer.lstrip('-').isdigit():
        found += [str(int(answer) + d) for d in (-1, 1, 10)] + [str(int(answer)*2), f'{int(answer)/2:g}']
    digits = [i for i, c in enumerate(answer) if c.isdigit()]
    if digits:
        i = rng.choice(digits)
        found.append(answer[:i] + str((int(answer[i]) + rng.integers(1, 9)) % 10) + answer[i+1:])
    return rng.permutation(found)


def simulate(seed=0):
    "Eight texts a problem, as REPORT says: its gold solution with another final answer in its box."
    import numpy as np, pandas as pd
    from mapo.problems import gsm8k, last_boxed, math_500
    rng, rows = np.random.default_rng(seed), []
    for problems in (gsm8k('test', DATA/'gsm8k/test.jsonl'), math_500(DATA/'math500/test.jsonl')):
        for p in problems.sample(min(N_PROBLEMS, len(problems)), random_state=seed).itertuples():
            chance, wrong = rng.beta(1, 1), mistakes(rng, p.answer, problems.answer)
            weight = 1/np.arange(1, len(wrong) + 1)
            for _ in range(N_SAMPLES):
                answer = rewritten(rng, p.answer) if rng.random() < chance else rng.choice(wrong, p=weight/weight.sum())
                if p.kind == 'math':
                    text = p.solution[::-1].replace(last_boxed(p.solution)[::-1], str(answer)[::-1], 1)[::-1]
                else: text = p.solution.rpartition('####')[0] + rf'The answer is $\boxed{{{answer}}}$.'
                rows.append(dict(gold=p.answer, text=text, kind=p.kind))
    return pd.DataFrame(rows)


def cpu_seconds(pid=0):
    "CPU seconds of this process, or of another one that runs (its clock's number as in clock_getcpuclockid)."
    return time.clock_gettime(~pid << 3 | 2) if pid else time.process_time()


def warm_up():
    "The free answers of tests/free_answers.txt: gold answers, texts and kinds."
    sys.path.insert(0, str(REPO/'tests'))
    from free_answers import hand_written
    golds, texts, _ = zip(*hand_written())
    return golds, texts, ['math']*len(golds)


def by_mapo(golds, texts, kinds, warm):
    "Verdicts, CPU seconds after importing and warming up (the worker's included), and how many questions it was asked."
    from mapo.answers import Grader, extract_answer
    read = lambda texts, kinds: [extract_answer(text, kind) for text, kind in zip(texts, kinds)]
    with Grader(n_workers=1) as grader:
        if warm: grader.grade(warm_up()[0], read(*warm_up()[1:]), 'math')
        asked, ask = [], grader._ask
        def spied(keys):
            asked.extend(keys)
            return ask(keys)
        grader._ask = spied
        worker = grader.workers[0]
        before = cpu_seconds(worker.process.pid) if worker.process else 0
        start = cpu_seconds()
        verdicts = grader.grade(golds, read(texts, kinds), kinds)
        spent = cpu_seconds() - start + (cpu_seconds(worker.process.pid) - before if worker.process else 0)
    return verdicts.tolist(), spent, len(asked)


def by_math_verify(golds, texts, kinds, warm):
    "The same from one loop over math-verify, asked about every sample."
    from math_verify import parse, verify
    decide = lambda golds, texts, _: [verify(parse(f'${gold}$'), parse(text)) for gold, text in zip(golds, texts)]
    if warm: decide(*warm_up())
    start = cpu_seconds()
    verdicts = decide(golds, texts, kinds)
    return verdicts, cpu_seconds() - start, len(verdicts)


def matrix(rng, n, m):
    "Entries of a matrix such as textbooks print."
    entries = [str(rng.integers(-9, 9)), rf'\frac{{{rng.integers(1, 9)}}}{{{rng.integers(2, 9)}}}',
               rf'\sqrt{{{rng.integers(2, 9)}}}', 'e^{2t}', r'\lambda',
               r'\cos\theta', r'-\sin\theta', 'a+b', rf'\frac{{{rng.integers(1, 9)}}}{{\sqrt{{{rng.integers(2, 9)}}}}}']
    return [[entries[k] for k in rng.integers(len(entries), size=m)] for _ in range(n)]


def written(entries, style='pmatrix'):
    return rf'\begin{{{style}}} ' + r' \\ '.join(' & '.join(row) for row in entries) + rf' \end{{{style}}}'


def matrices(n_golds=20, seed=0):
    "Gold answers: a matrix, a sum, a product or a list of them; eight answers to each, one to three of them right."
    import numpy as np, pandas as pd
    rng, rows = np.random.default_rng(seed), []
    for i in range(n_golds):
        n = rng.integers(3, 6)
        one, two, other = (matrix(rng, n, n) for _ in range(3))
        turned = [list(row) for row in zip(*one)]
        gold, right = [(written(one), [written(one, 'bmatrix')]),
                       (f'{written(one)} + {written(two)}', [f"{written(two, 'bmatrix')} + {written(one)}"]),
                       (f'{written(one)} {written(two)}', [f"{written(one, 'bmatrix')} {written(two, 'bmatrix')}"]),
                       (f'P = {written(one)}, D = {written(two)}',
                        [f"P = {written(one, 'bmatrix')}, D = {written(two, 'bmatrix')}"])][i % 4]
        wrong = [written(turned), written(other), written(other, 'bmatrix'), f'{written(one)} - {written(two)}',
                 gold.replace('2', '3'), 'x', '5']
        rows += [dict(gold=gold, text=rf'Therefore we obtain \[ \boxed{{{answer}}} \]', kind='math')
                 for answer in (right + wrong)[:N_SAMPLES]]
    return pd.DataFrame(rows)


METHODS = {'math-verify': by_math_verify, 'mapo': by_mapo}


def measure(method, rows, repeats=1, fresh=True):
    "Verdicts, CPU seconds of a whole fresh process and of a running one (medians), and questions asked."
    whole, running = [0], []
    with tempfile.NamedTemporaryFile('w', suffix='.jsonl') as file:
        rows[['gold', 'text', 'kind']].to_json(file, orient='records', lines=True)
        file.flush()
        for _ in range(repeats):
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            command = [sys.executable, __file__, '--only', method, file.name]
            if fresh: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            whole.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
            verdicts, seconds, asked = json.loads(subprocess.check_output([*command, '--warm']))
            running.append(seconds)
    return verdicts, statistics.median(whole[1:]), statistics.median(running), asked


def markdown(head, rows):
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in (head, ['---']*len(head), *rows))


def judged():
    "A careful teacher's verdicts beside both graders', as a table."
    sys.path.insert(0, str(REPO/'tests'))
    import pandas as pd
    from free_answers import generated, hand_written, later, unseen
    from mapo.problems import math_500
    sets = {'by hand; mapo was mended on it': hand_written(), 'by hand later; mended on it since': later(),
            'by hand, kept aside': unseen()}
    made = 'MATH-500 in eight styles, and with a digit changed'
    if DATA.is_dir(): sets[made] = generated(math_500(DATA/'math500/test.jsonl').answer)
    table = []
    for name, rows in sets.items():
        frame = pd.DataFrame(rows, columns=['gold', 'text', 'right']).assign(kind='math')
        ours, theirs = (pd.Series(measure(method, frame, fresh=False)[0]) for method in ('mapo', 'math-verify'))
        rights, accepts, refusals = zip(*((sum(said == frame.right), sum(said & ~frame.right), sum(~said & frame.right))
                                          for said in (ours, theirs)))
        table.append((name, len(rows), *rights, *accepts, *refusals))
    return markdown(['free answers', 'n', 'mapo as the teacher', 'math-verify', 'false accepts: mapo', 'math-verify',
                     'false refusals: mapo', 'math-verify'], table)


def sets_of_samples(path):
    "Samples by the name of their row in the table of speeds."
    import pandas as pd
    found = {}
    if DATA.is_dir():
        simulated = simulate()
        found['simulated: GSM8K and MATH-500'] = simulated
        for name, kind in (('GSM8K', 'number'), ('MATH-500', 'math')):
            found[f'simulated: {name}'] = simulated[simulated.kind == kind]
    found['long matrices'] = matrices()
    if path:
        real = pd.read_json(path, lines=True, dtype=False)
        found['real samples'] = real
        if real.kind.nunique() > 1:
            found |= {f'real samples of kind {kind}': part for kind, part in real.groupby('kind')}
    return found


REPORT = r"""# Grading: mapo against plain math-verify

`{command}`, {date}.

## Verdicts
Free answers as models write them, with a careful teacher's verdict. Those by hand are in `tests/free_answers*.txt`;
the last row is made of MATH-500's gold answers, each in the style of some model, and with one digit changed, which
makes it wrong.

{judged}

## Speed
mapo's work includes extraction; math-verify's is `verify(parse(gold), parse(text))` for each sample, as its users call
it. Figures are CPU seconds, child processes included{median}. *Fresh* is a whole process that grades that row's samples
alone, from its start to its end, imports and the start of mapo's worker included. *Running* is from the first sample to
the last verdict in a process that has graded the {warm} hand-written free answers before: math-verify's parser learns
its grammar as it goes, on either side.

{results}

`distinct` is the share of distinct (gold, answer) pairs, `asked` how many of them mapo asked math-verify about.
{absent}
The simulated samples are gold solutions of GSM8K's and MATH-500's test sets, {n_problems} problems of each, with
another final answer in their box, eight texts a problem. A problem's chance of a right answer is drawn from Beta(1, 1);
three right answers in ten are written otherwise (`\dfrac`, `18.0`, `1,000`, a unit). A wrong answer is one of up to ten
mistakes of that problem (answers of other problems; neighbours and multiples of a number, a changed digit), the k-th
with a weight of 1/k, since samples of one model repeat the same few mistakes. The matrices are gold answers that are a
matrix, a sum, a product or a list of them, and eight answers to each, of which one to three are right.
{real}
## Where the verdicts differ
{different}
"""


def main():
    parser = argparse.ArgumentParser(description='Grading: mapo against plain math-verify.')
    parser.add_argument('samples', nargs='?', help='JSON lines of gold, text and kind')
    parser.add_argument('--repeats', type=int, default=1, help='measurements of each figure; their median counts')
    parser.add_argument('--only', choices=METHODS, help='grade the samples in this process and print what came of it')
    parser.add_argument('--warm', action='store_true', help='with --only: grade the hand-written free answers first')
    parser.add_argument('--note', default='', help='a sentence on the samples, for the report')
    parser.add_argument('--out', default=REPO/'benchmarks/grading.md', help='where the results are written')
    args = parser.parse_args()
    logging.disable()
    if args.only:
        rows = [json.loads(line) for line in open(args.samples)]
        columns = ([row[column] for row in rows] for column in ('gold', 'text', 'kind'))
        return print(json.dumps(METHODS[args.only](*columns, args.warm)))

    import numpy as np
    from mapo.answers import extract_answer
    table, differ = [], []
    for name, part in sets_of_samples(args.samples).items():
        theirs, their_fresh, their_running, _ = measure('math-verify', part, args.repeats)
        ours, our_fresh, our_running, asked = measure('mapo', part, args.repeats)
        said = part.assign(answer=[extract_answer(t, k) for t, k in zip(part.text, part.kind)], mapo=ours)
        n_distinct = len(said.drop_duplicates(['gold', 'answer', 'kind']))
        table.append((name, len(part), f'{n_distinct/len(part):.0%}', asked, f'{np.mean(ours):.3f}',
                      f'{np.mean(theirs):.3f}',
                      f'{our_fresh:.2f}', f'{their_fresh:.2f}', f'**{their_fresh/our_fresh:.1f}**',
                      f'{our_running:.2f}', f'{their_running:.2f}', f'**{their_running/our_running:.1f}**'))
        other = said[np.array(ours) != theirs]
        differ.append((name, len(other), sum(other.mapo), sum(~other.mapo)))
        listed = other[['gold', 'answer', 'mapo']].values.tolist()[:10]
        print(f'{name}: {len(other)} verdicts differ', *listed, sep='\n  ', flush=True)
    speed = ['samples', 'n', 'distinct', 'asked', 'right: mapo', 'math-verify', 'fresh: mapo', 'math-verify', 'ratio',
             'running: mapo', 'math-verify', 'ratio']
    absent = '' if DATA.is_dir() else '\nThe folder of public test sets was absent: rows that need it are left out.\n'
    report = REPORT.format(
        command=' '.join(['python benchmarks/grading.py'] + ['SAMPLES.jsonl']*bool(args.samples)
                         + [f'--repeats {args.repeats}']*(args.repeats > 1)),
        date=time.strftime('%Y-%m-%d'), judged=judged(), warm=len(warm_up()[0]), n_problems=N_PROBLEMS,
        results=markdown(speed, table), absent=absent,
        median=f', medians of {args.repeats}' if args.repeats > 1 else '',
                           real=f'\n{textwrap.fill(args.note, 120)}\n' if args.note else '',
        different=markdown(['samples', 'differ', 'accepted by mapo alone', 'accepted by math-verify alone'], differ))
    Path(args.out).write_text(report)
    print(report)


if __name__ == '__main__': main()
