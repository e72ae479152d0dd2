"""Grading: mapo against plain math-verify, side by side in one run.

    python benchmarks/grading.py [SAMPLES.jsonl] [--repeats 3] [--out benchmarks/grading.md]
    python benchmarks/grading.py --verdicts    # free answers with a careful teacher's verdict (tests/free_answers.py)
    python benchmarks/grading.py --matrices    # college-level gold answers with long matrices

SAMPLES.jsonl holds one object a line with `gold`, `text` and `kind` (`number`, `math` or `choice`): what a model wrote.
Without it, texts are simulated from GSM8K's and MATH-500's test sets (see `simulate`), read from the folder
MAPO_SHARED_DATA or ../shared/data beside the repository.

Each measurement is a process of its own (`--only mapo [--warm] SAMPLES.jsonl`), so that none profits from what another
left in a cache. It imports what it needs and nothing else, and grades the samples.
"""
import argparse, json, logging, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('MAPO_SHARED_DATA', REPO/'../shared/data'))
N_SAMPLES = 8


def rewritten(rng, answer):
    "A right answer as models write it: as it stands more often than not, else in another writing of the same value."
    others = [answer.replace(r'\frac', r'\dfrac'), answer.replace(' ', ''), answer.replace(',', ', ') if '(' in answer else answer]
    if answer.isdigit(): others += [f'{answer}.0', f'{int(answer):,}', rf'\${answer}', rf'{answer} \text{{ units}}']
    return rng.choice([answer, others[rng.integers(len(others))]], p=[.7, .3])


def mistakes(rng, answer, others):
    "Wrong answers to one problem: neighbours and multiples of a number, a digit changed, other problems' answers."
    alike = [a for a in others if a.lstrip('-').isdigit() == answer.lstrip('-').isdigit()]
    found = [str(alike[i]) for i in rng.integers(len(alike), size=4)]
    if answer.lstrip('-').isdigit(): found += [str(int(answer) + d) for d in (-1, 1, 10)] + [str(int(answer)*2), f'{int(answer)/2:g}']
    digits = [i for i, c in enumerate(answer) if c.isdigit()]
    if digits:
        i = rng.choice(digits)
        found.append(answer[:i] + str((int(answer[i]) + rng.integers(1, 9)) % 10) + answer[i+1:])
    return rng.permutation(found)


def simulate(seed=0):
    "Eight texts a problem, as SIMULATED says: its gold solution with another final answer in its box."
    import numpy as np, pandas as pd
    from mapo.problems import gsm8k, last_boxed, math_500
    rng, rows = np.random.default_rng(seed), []
    for problems in (gsm8k('test', DATA/'gsm8k/test.jsonl'), math_500(DATA/'math500/test.jsonl')):
        for p in problems.itertuples():
            chance, wrong = rng.beta(1, 1), mistakes(rng, p.answer, problems.answer)
            weight = 1/np.arange(1, len(wrong) + 1)
            for _ in range(N_SAMPLES):
                answer = rewritten(rng, p.answer) if rng.random() < chance else rng.choice(wrong, p=weight/weight.sum())
                if p.kind == 'math': text = p.solution[::-1].replace(last_boxed(p.solution)[::-1], str(answer)[::-1], 1)[::-1]
                else: text = p.solution.rpartition('####')[0] + rf'The answer is $\boxed{{{answer}}}$.'
                rows.append(dict(gold=p.answer, text=text, kind=p.kind))
    return pd.DataFrame(rows)


def cpu_seconds(pid=0):
    "CPU seconds of this process, or of another one that runs (its clock's number as in clock_getcpuclockid)."
    return time.clock_gettime(~pid << 3 | 2) if pid else time.process_time()


def by_mapo(golds, texts, kinds, warm):
    "Verdicts, CPU seconds after importing and warming up (the worker's included), and how many questions the worker was asked."
    from mapo.answers import Grader, extract_answer
    with Grader() as grader:
        if warm: grader.grade(['x+1'], [extract_answer(r'\boxed{1+x}', 'math')], 'math')
        before = {w: cpu_seconds(w.process.pid) for w in grader.workers if w.process}
        start, asked, ask = cpu_seconds(), [], grader._ask
        def spied(keys):
            asked.extend(keys)
            return ask(keys)
        grader._ask = spied
        verdicts = grader.grade(golds, [extract_answer(t, k) for t, k in zip(texts, kinds)], kinds)
        spent = cpu_seconds() - start + sum(cpu_seconds(w.process.pid) - before.get(w, 0) for w in grader.workers if w.process)
    return verdicts.tolist(), spent, len(asked)


def by_math_verify(golds, texts, kinds, warm):
    "The same from one loop over math-verify, asked about every sample."
    from math_verify import parse, verify
    if warm: verify(parse('$x+1$'), parse(r'\boxed{1+x}'))
    start = cpu_seconds()
    verdicts = [verify(parse(f'${gold}$'), parse(text)) for gold, text in zip(golds, texts)]
    return verdicts, cpu_seconds() - start, len(verdicts)


def matrix(rng, n, m):
    "Entries of a matrix such as textbooks print."
    entries = [str(rng.integers(-9, 9)), rf'\frac{{{rng.integers(1, 9)}}}{{{rng.integers(2, 9)}}}', rf'\sqrt{{{rng.integers(2, 9)}}}', 'e^{2t}', r'\lambda',
               r'\cos\theta', r'-\sin\theta', 'a+b', rf'\frac{{{rng.integers(1, 9)}}}{{\sqrt{{{rng.integers(2, 9)}}}}}']
    return [[entries[k] for k in rng.integers(len(entries), size=m)] for _ in range(n)]


def written(entries, style='pmatrix'):
    return rf'\begin{{{style}}} ' + r' \\ '.join(' & '.join(row) for row in entries) + rf' \end{{{style}}}'


def matrices(n_golds=40, seed=0):
    "Gold answers that are a matrix, a sum, a product or a list of them, and eight answers to each, of which one to three are right."
    import numpy as np, pandas as pd
    rng, rows = np.random.default_rng(seed), []
    for i in range(n_golds):
        n = rng.integers(3, 6)
        one, two, other = (matrix(rng, n, n) for _ in range(3))
        turned = [list(row) for row in zip(*one)]
        gold, right = [(written(one), [written(one, 'bmatrix')]), (f'{written(one)} + {written(two)}', [f"{written(two, 'bmatrix')} + {written(one)}"]),
                       (f'{written(one)} {written(two)}', [f"{written(one, 'bmatrix')} {written(two, 'bmatrix')}"]),
                       (f'P = {written(one)}, D = {written(two)}', [f"P = {written(one, 'bmatrix')}, D = {written(two, 'bmatrix')}"])][i % 4]
        wrong = [written(turned), written(other), written(other, 'bmatrix'), f'{written(one)} - {written(two)}', gold.replace('2', '3'), 'x', '5']
        rows += [dict(gold=gold, text=rf'Therefore we obtain \[ \boxed{{{answer}}} \]', kind='math') for answer in (right + wrong)[:N_SAMPLES]]
    return pd.DataFrame(rows)


def judged():
    "A careful teacher's verdicts beside both graders', as a table."
    sys.path.insert(0, str(REPO/'tests'))
    import pandas as pd
    from free_answers import generated, hand_written, unseen
    from mapo.problems import math_500
    sets = {'by hand': hand_written(), 'by hand, written later': unseen()}
    if DATA.is_dir(): sets['from MATH-500'] = generated(math_500(DATA/'math500/test.jsonl').answer)
    table = []
    for name, rows in sets.items():
        frame = pd.DataFrame(rows, columns=['gold', 'text', 'right']).assign(kind='math')
        for method in METHODS:
            said = pd.Series(measure(method, frame)[0])
            table.append((name, len(rows), method, sum(said == frame.right), sum(said & ~frame.right), sum(~said & frame.right)))
    return markdown(['free answers', 'number', 'grader', 'as the teacher', 'false accepts', 'false refusals'], table)


METHODS = {'math-verify': by_math_verify, 'mapo': by_mapo}


def measure(method, rows, repeats=1):
    "Verdicts, CPU seconds of a whole fresh process and of a running one (medians), and questions asked."
    fresh, running = [], []
    with tempfile.NamedTemporaryFile('w', suffix='.jsonl') as file:
        rows[['gold', 'text', 'kind']].to_json(file, orient='records', lines=True)
        file.flush()
        for _ in range(repeats):
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            command = [sys.executable, __file__, '--only', method, file.name]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            fresh.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
            verdicts, seconds, asked = json.loads(subprocess.check_output([*command, '--warm']))
            running.append(seconds)
    return verdicts, statistics.median(fresh), statistics.median(running), asked


def markdown(head, rows):
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in (head, ['---']*len(head), *rows))


SIMULATED = r"""The samples are **simulated**, not a model's: each is a gold solution of GSM8K's or MATH-500's test set with another
final answer in its box, eight texts a problem. A problem's chance of a right answer is drawn from Beta(1, 1); three right answers
in ten are written otherwise (`\dfrac`, `18.0`, `1,000`, a unit). A wrong answer is one of up to ten mistakes of that problem
(answers of other problems, whole numbers for whole numbers, formulas for formulas; neighbours and multiples of a number, a changed digit), the k-th with a weight of 1/k, since samples of
one model repeat the same few mistakes."""

REPORT = """# Grading: mapo against plain math-verify

`{command}`, {date}. mapo's work includes extraction; math-verify's is `verify(parse(gold), parse(text))` for each sample.
Each figure is CPU seconds, child processes included, {median}of a process that grades that row's samples alone:
*fresh* is the whole process from its start to its end, imports and the start of mapo's worker included; *running* is from
the first sample to the last verdict, after both have imported what they need, started their workers and decided one formula.

{source}

{n:,} samples; {share:.0%} of their (gold, answer) pairs are distinct, and mapo asks math-verify about {asked} of them ({asked_share:.2%} of the samples).

{results}

## Where the verdicts differ
{n_different} of {n:,} samples, {n_pairs} distinct pairs. The column `mapo` is mapo's verdict; math-verify's is the other one.

{differences}

## What is mended
math-verify's verdicts on answers that it is known to get wrong, and mapo's:

{mended}
"""

MENDED = [('52_8', '52'), (r'7\pi', '7pi'), (r'\sqrt{51}', '√51'), ('4210_{5}', '4210')]


def main():
    parser = argparse.ArgumentParser(description='Grading: mapo against plain math-verify.')
    parser.add_argument('samples', nargs='?', help='JSON lines of gold, text and kind; simulated ones if absent')
    parser.add_argument('--repeats', type=int, default=1, help='measurements of each figure, of which the median counts')
    parser.add_argument('--only', choices=METHODS, help='grade the samples in this process and print what came of it')
    parser.add_argument('--warm', action='store_true', help='with --only: decide one formula first')
    parser.add_argument('--verdicts', action='store_true', help="compare both graders with a careful teacher's verdicts, and no more")
    parser.add_argument('--matrices', action='store_true', help='grade answers that are long matrices')
    parser.add_argument('--out', default=REPO/'benchmarks/grading.md', help='where the results are written')
    args = parser.parse_args()
    logging.disable()
    if args.only:
        rows = [json.loads(line) for line in open(args.samples)]
        return print(json.dumps(METHODS[args.only](*([row[c] for row in rows] for c in ('gold', 'text', 'kind')), args.warm)))

    import numpy as np, pandas as pd
    from mapo.answers import extract_answer
    if args.verdicts: return print(judged())
    if not args.samples and not args.matrices and not DATA.is_dir(): raise SystemExit(f'there is no folder {DATA}: set MAPO_SHARED_DATA, or give a file of samples')
    rows = pd.read_json(args.samples, lines=True, dtype=False) if args.samples else matrices() if args.matrices else simulate()
    rows['answer'] = [extract_answer(t, k) for t, k in zip(rows.text, rows.kind)]
    distinct, kinds = rows.drop_duplicates(['gold', 'answer', 'kind']), rows.kind.unique()
    parts = [(name if kind is None else f'{name}, kind {kind}', part if kind is None else part[part.kind == kind])
             for name, part in (('all samples', rows), ('distinct answers', distinct)) for kind in (None, *(kinds if len(kinds) > 1 else ()))]

    table, different = [], None
    for name, part in parts:
        theirs, their_fresh, their_running, _ = measure('math-verify', part, args.repeats)
        ours, our_fresh, our_running, asked = measure('mapo', part, args.repeats)
        table.append((name, len(part), asked, f'{np.mean(theirs):.3f}', f'{np.mean(ours):.3f}', f'{their_fresh:.2f}', f'{our_fresh:.2f}', f'**{their_fresh/our_fresh:.1f}**',
                      f'{their_running:.3f}', f'{our_running:.3f}', f'**{their_running/our_running:.1f}**'))
        if different is None: different = part.assign(mapo=ours)[np.array(ours) != theirs].value_counts(['gold', 'answer', 'kind', 'mapo'], dropna=False).reset_index()

    mended = pd.DataFrame([dict(gold=g, text=rf'\boxed{{{a}}}', kind='math') for g, a in MENDED])
    verdicts = [['right' if right else 'wrong' for right in measure(method, mended)[0]] for method in METHODS]
    Path(args.out).write_text(report := REPORT.format(
        command='python benchmarks/grading.py' + (' SAMPLES.jsonl' if args.samples else ' --matrices' if args.matrices else '') + (f' --repeats {args.repeats}' if args.repeats > 1 else ''), date=time.strftime('%Y-%m-%d'),
        median=f'the median of {args.repeats} runs ' if args.repeats > 1 else '', source='Samples from a file.' if args.samples else matrices.__doc__ if args.matrices else SIMULATED,
        n=len(rows), share=len(distinct)/len(rows), asked=table[0][2], asked_share=table[0][2]/len(rows), n_different=sum(different['count']), n_pairs=len(different),
        results=markdown(['samples', 'number', 'asked', 'right: math-verify', 'right: mapo', 'fresh: math-verify', 'fresh: mapo', 'ratio', 'running: math-verify', 'running: mapo', 'ratio'], table),
        mended=markdown(['gold', 'answer', 'math-verify', 'mapo'], [(f'`{g}`', f'`{a}`', *both) for (g, a), *both in zip(MENDED, *verdicts)]),
        differences=markdown(['gold', 'answer', 'kind', 'mapo', 'samples'],
            [(f'`{r.gold}`', f'`{r.answer}`', r.kind, 'right' if r.mapo else 'wrong', r.count) for r in different.itertuples(index=False)])))
    print(report)


if __name__ == '__main__': main()
