"""Time and memory of sampling, grading, pairs and report, for 1,000 to 1,000,000 turns; the engine answers at once.

    python benchmarks/scale.py [--turns 1000 10000 100000 1000000] [--out benchmarks/scale]

Three agents answer word problems eight times each, in texts of a few steps and a final answer. Every part is a stage
in a process of its own, which reads the tables of the stages before it and writes its own, as a run would. `--out`
writes NAME.md and NAME.png.
"""
import argparse, json, os, platform, subprocess, sys, tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from mapo.runs import Run, scored

PARTS = ('sampling', 'grading', 'pairs', 'report', 'figures')
AGENTS, SAMPLES, SEEDS = ('ada', 'bob', 'cleo'), 8, 5
# of the report: half of the samples are taken for each, the last of a half for its greedy answer
ARMS = ('base', 'mars_po')
COMPARISONS = [['mars_po', 'base']]
CHUNK = 1024 # answers, as in the paper presets
LINEAR = 1.1 # exponent above which a part is called more than linear


# what is asked and answered

STEPS = [ # four ways of writing each of four steps
    ('First, the crates: {a} crates of {b} apples are {a} * {b} = {ab} apples.',
     'There are {a} crates with {b} apples in each, so {a} * {b} = {ab} apples.',
     'Multiplying the crates by what is in them gives {ab} apples, since {a} * {b} = {ab}.',
     'Let x be the number of apples in all crates. Then x = {a} * {b} = {ab}.'),
    ('To these come {c} loose apples, {ab} + {c} = {abc}.',
     'Adding the {c} that lie beside them, we have {ab} + {c} = {abc}.',
     'With the loose ones that makes {abc} apples, because {ab} + {c} = {abc}.',
     'The loose apples count as well: {ab} + {c} = {abc}.'),
    ('They are shared out among {d} families, so each gets {abc} / {d} apples.',
     'Each of the {d} families takes an equal part, {abc} divided by {d}.',
     'Now divide by the {d} families: {abc} / {d}.', 'A family gets one part in {d} of {abc} apples.'),
    ('So that is the answer.', 'Nothing else was asked, so we are done.',
     'Let me check: {d} times that is {abc} again, as it should be.', 'This is what each family takes home.')]
ENDINGS = dict(whole='#### {}', fraction='The answer is $\\boxed{{{}}}$.', surd='The answer is $\\boxed{{{}}}$.')


def word_problems(count:int):
    "Problems of three forms: whole numbers, fractions, and, one in twenty, roots, with right answers in two ways."
    a, b, c, d = np.random.default_rng(0).integers(2, 99, (4, count))
    form = np.where(np.arange(count) % 20 == 19, 'surd', np.where(np.arange(count) % 2, 'fraction', 'whole'))
    answer = [f'{w}\\sqrt{{{z}}}' if f == 'surd' else str(w*x + y) if f == 'whole' else f'\\frac{{{w*x + y}}}{{{z}}}'
              for f, w, x, y, z in zip(form, a, b, c, d)]
    question = [f'A grower brings {w} crates of {x} apples to the market, and {y} loose ones. They are '
                f'to be shared out evenly among {z} families ({f}, lot {i}). What does each take home?'
                for i, (f, w, x, y, z) in enumerate(zip(form, a, b, c, d))]
    return pd.DataFrame(dict(problem_id=[f'p{i}' for i in range(count)], question=question, answer=answer, solution='',
                             kind=np.where(form == 'whole', 'number', 'math'), split='train', source='scale'))


@lru_cache(64)
def worked(question, slip):
    "Every way of writing each step, and of ending, if the product is wrong by `slip`."
    a, b, c, d = (int(word) for word in question.split() if word.isdigit())
    form = question.partition('(')[2].partition(',')[0]
    told = dict(a=a, b=b, c=c, d=d, ab=a*b + slip, abc=a*b + slip + c)
    answers = dict(whole=[a*b + slip + c], fraction=[f'\\frac{{{a*b + slip + c}}}{{{d}}}'],
                   surd=[f'{a + slip}\\sqrt{{{d}}}', f'\\sqrt{{{(a + slip)**2*d}}}'])[form]
    return [[way.format_map(told) for way in step] for step in STEPS], [ENDINGS[form].format(x) for x in answers]


def script(skill):
    "An agent that is right about so often, and rambles until it is cut off once in 128 times."
    def write(messages, seed):
        drawn = seed*0x9E3779B97F4A7C15 >> 20
        steps, endings = worked(messages[-1]['content'], 0 if drawn % 1000 < skill*1000 else 1 + drawn % 3)
        lines = [step[drawn >> 2*i + 10 & 3] for i, step in enumerate(steps)]
        return '\n'.join([*lines*(30 if drawn >> 30 & 127 == 0 else 1), endings[(drawn >> 9) % len(endings)]])
    return write


# the parts

def sample_scripted(draft, *, problems, n:int, chunk_answers:int):
    "Every agent answers every problem; chunks are written when they are finished, as for any engine."
    from mapo.agents import Agent, Model, Role, Team
    from mapo.agents import Sampling
    from mapo.engines import ScriptedEngine
    from mapo.sampling import ask_alone, sample_turns
    team = Team('scale', [Agent(name, Model(name, 'tiny:products'),
                                Role('generator', 'Solve the problem step by step.\n\n{question}')) for name in AGENTS])
    engines = {name: ScriptedEngine(script(skill), name) for name, skill in zip(AGENTS, (.5, .6, .7))}
    contexts, turns = sample_turns(ask_alone(problems.read('problems'), team, n, 'train', 1),
                                   lambda model: engines[model.name], Sampling(max_tokens=384), chunk_answers,
                                   draft.map)
    draft.write('contexts', contexts)
    draft.write('turns', turns)
    draft.log |= dict(turns=len(turns), characters=round(turns['text'].str.len().mean()),
                      distinct=round(turns['text'].nunique()/len(turns), 2))


def make_record(draft, *, turns, scores):
    "What a paper's record keeps of graded answers, and its tables with intervals."
    from mapo.evaluation import accuracy, compact, compare
    from mapo.record import save_record
    from mapo.tables import claims_table, results_table, save_table
    table = scored(turns, scores)[['agent', 'problem_id', 'sample', 'answer', 'correct']]
    place, each = table['problem_id'].str[1:].astype(int), SAMPLES//len(ARMS)
    dealt = table.assign(arm=np.array(ARMS)[table['sample']//each], sample=table['sample'] % each,
                         greedy=table['sample'] % each == each - 1, seed=place % SEEDS,
                         problem_id='q' + (place//SEEDS).astype(str))
    rows = compact(dealt.assign(iteration=(dealt['arm'] != 'base').astype(int)))
    claims = [dict(claim='it helps', paper='none', tests=COMPARISONS)]
    costs = pd.DataFrame([dict(arm='mars_po', seed=s, tokens_sampled=0, tokens_trained=0, updates=0)
                          for s in range(SEEDS)])
    manifest = dict(run='scale', command='', commit='', parameters=dict(split='test'), hardware={},
                    comparisons=COMPARISONS, claims=claims)
    save_record(draft.path/'record', rows, costs, manifest)
    tables = dict(results=results_table(rows, costs), agents=accuracy(rows), comparisons=compare(rows, COMPARISONS),
                  claims=claims_table(claims, rows, COMPARISONS))
    for name, made in tables.items(): save_table(made, draft.path, name)


def draw_record(draft, *, record):
    "Every figure and table of the record."
    from mapo.record import redraw
    redraw(record.path/'record', draft.path)


def artifacts(run, turns, part):
    "What a part makes, the turns it came from first; the parts before it are there already."
    from mapo.pairs import Selection, hybrid_pairs
    from mapo.rewards import grade
    problems = run.stage(word_problems, count=-(-turns//(len(AGENTS)*SAMPLES*SEEDS))*SEEDS)
    said = run.stage(sample_scripted, problems=problems, n=SAMPLES, chunk_answers=CHUNK)
    if part == 'sampling': return said, [said]
    graded = run.stage(grade, turns=said, problems=problems)
    if part == 'grading': return said, [graded]
    how = dict(turns=(said, graded), contexts=said, selection=Selection(missed=True))
    if part == 'pairs': return said, [run.stage(hybrid_pairs, agent=name, **how) for name in AGENTS]
    record = run.stage(make_record, turns=said, scores=graded)
    return said, [record if part == 'report' else run.stage(draw_record, record=record)]


# measuring

def child(part, root, turns):
    "One part at one size, in this process: seconds, and megabytes beside those that the imports hold."
    import mapo.engines, mapo.methods, mapo.record, mapo.rewards # noqa: F401 imports are in no part's time
    run = Run('scale', dict(turns=turns), root=root)
    run.stage(word_problems, count=1).read('problems') # pandas' and pyarrow's first use
    before = peak()
    said, made = artifacts(run, turns, part)
    rows = sum(len(a.read('data')) for a in made) if part == 'pairs' else 0
    print(json.dumps(dict(part=part, turns=said.log['turns'], cpu=sum(a.log['cpu_s'] for a in made),
                          memory=max(a.log['peak_memory_mb'] for a in made) - before, imports=before, pairs=rows,
                          characters=said.log['characters'], distinct=said.log['distinct'])))


def peak():
    "Most memory this process has held, in MiB, as a stage's log has it."
    from mapo.runs import _peak_memory
    return _peak_memory()


def measure(part, root, turns):
    "The same, in a process of its own."
    command = [sys.executable, __file__, '--part', part, '--root', root, '--turns', str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                          env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    print(done.stdout, end='', file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def slope(own, column):
    "The exponent of a part: log(cost) over log(turns) between its two largest sizes, where fixed costs weigh least."
    return (float(np.diff(np.log(own[column].clip(lower=1e-3).iloc[-2:]))[0]/np.diff(np.log(own['turns'].iloc[-2:]))[0])
            if len(own) > 1 else np.nan)


def report(measured, command):
    "The measurement as Markdown."
    largest, parts = measured['turns'].max(), [p for p in PARTS if p in set(measured['part'])]
    own = {part: measured[measured['part'] == part] for part in parts}
    cells = lambda column, form: [f'| {part} | ' + ' | '.join(form.format(v) for v in own[part][column])
                                  + f" | {slope(own[part], column):.2f} |" for part in parts]
    sizes = ' | '.join(f'{n:,}' for n in sorted(measured['turns'].unique()))
    head = lambda what: ['', f'| {what} | {sizes} | exponent |', '|---|' + '--:|'*(measured['turns'].nunique() + 1)]
    each = lambda part, column, unit: unit*own[part][column]/own[part]['turns']
    beside = lambda costs: f'{costs.iloc[-1]/costs.iloc[-2]:.2f}' if len(costs) > 1 else ''
    per = [f"| {part} | {each(part, 'cpu', 1e6).iloc[-1]:.0f} µs | {beside(each(part, 'cpu', 1))} | "
           f"{each(part, 'memory', 2**20).iloc[-1]:,.0f} bytes | {beside(each(part, 'memory', 1))} |" for part in parts]
    steep = [p for p in parts for c in ('cpu', 'memory') if slope(own[p], c) > LINEAR]
    last, pairs = measured.iloc[-1], measured.loc[measured['part'] == 'pairs', 'pairs'].max()
    return '\n'.join([
        '# From a thousand turns to a million', '', f'`{command}`', '', '![Time and memory over turns](scale.png)', '',
        f"Three agents answer each problem {SAMPLES} times through a scripted engine: {last['characters']:,.0f} "
        f"characters a text, {last['distinct']:.0%} of the texts distinct, {pairs:,.0f} pairs of the largest size. "
        'Every part runs as a stage in a process of its own, reads its tables from disk and writes them there; memory '
        'is '
        'its peak beside what the imports hold '
        f"({measured['imports'].min():,.0f} to {measured['imports'].max():,.0f} MiB).",
        *head('CPU seconds, by turns'), *cells('cpu', '{:.2f}'), *head('peak memory, MiB, by turns'),
                      *cells('memory', '{:,.0f}'),
        '', f'| at {largest:,} turns | time per turn | times that of the size before | memory per turn | times that of '
            f'the size before |', '|---|--:|--:|--:|--:|', *per, '',
        f"All parts of {largest:,} turns together: {sum(own[p]['cpu'].iloc[-1] for p in parts):,.0f} CPU seconds. "
        f"Exponents are slopes on logarithmic scales between the two largest sizes; at the smaller ones, what a part "
        f"costs once is most of it. "
        + (f"More than linear (exponent over {LINEAR}): {', '.join(dict.fromkeys(steep))}." if steep
           else f'No part grows faster than the turns (exponent at most {LINEAR}).'),
        '', f'Python {platform.python_version()}, pandas {pd.__version__}, one thread, {os.cpu_count()} cores shared '
            f'with other work, {platform.machine()}, load average {os.getloadavg()[0]:.1f} at the end.'])


def draw(measured, path):
    "Both on logarithmic scales, with what linear would be."
    from mapo.figures import Picture, figure_style
    from mapo.tables import palette
    with figure_style():
        figure = Picture(6.4, 2.9)
        for axes, column, title, unit in zip(figure.subplots(1, 2), ('cpu', 'memory'),
                                             ('CPU seconds', 'Peak memory, MiB'), (1e-5, 1e-3)):
            ends = np.array([measured['turns'].min(), measured['turns'].max()])
            axes.plot(ends, ends*unit, color='#8c8c8c', linewidth=.8, linestyle=(0, (3, 2)))
            middle = np.sqrt(ends.prod())
            axes.annotate('linear', (middle, middle*unit), xytext=(4, -3), textcoords='offset points', color='#737373',
                          fontsize=6.5, va='top')
            for (part, own), color, marker in zip(measured.groupby('part', sort=False), palette, 'osD^v'):
                axes.plot(own['turns'], own[column].clip(lower=1e-3), color=color, marker=marker,
                          label=f'{part} ({slope(own, column):.2f})')
            axes.set(xscale='log', yscale='log', xlabel='turns', title=title)
            axes.legend(loc='upper left', handlelength=1.6, title='exponent at the end', title_fontsize=6.5,
                        alignment='left')
        figure.savefig(path, metadata=dict(Software=None))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--turns', type=int, nargs='+', default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument('--out', type=Path, help='write the result here too, as NAME.md and NAME.png')
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument('--root', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part: return child(args.part, args.root, *args.turns)
    rows = []
    for turns in args.turns:
        with tempfile.TemporaryDirectory() as root: rows += [measure(part, root, turns) for part in PARTS]
    measured = pd.DataFrame(rows)
    given = ([f"--turns {' '.join(map(str, args.turns))}"]*(args.turns != parser.get_default('turns'))
             + [f'--out {args.out}']*bool(args.out))
    text = report(measured, ' '.join(['python benchmarks/scale.py', *given]))
    print(text)
    if args.out:
        args.out.with_suffix('.md').write_text(text + '\n')
        draw(measured, args.out.with_suffix('.png'))


if __name__ == '__main__': main()
