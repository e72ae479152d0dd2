"""From scored turns to pairs: CPU-seconds and memory at 10,000, 100,000 and 1,000,000 turns of one kilobyte.

    python benchmarks/pairs.py [--turns 10000 100000 1000000] [--out benchmarks/pairs.md]

Turns, scores and contexts are generated into a scratch folder. A fresh process then reads them, joins the scores,
builds Mars-PO's pairs for each of three agents and writes each agent's pairs, all as Parquet. Time inside the library
is reported apart from reading and writing. At the end `datasets` and TRL read what was written.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

AGENTS, SAMPLES = ['ada', 'bob', 'cid'], 8
LIMITS = dict(cpu=10, gb=4) # of a million turns, from the project's plan
REPEATED = .1 # share of turns whose text the same agent has given before
TOKENS = 300 # of a turn


def generate(folder, n):
    "Write `n` turns of about one kilobyte, half of them right, with their scores and contexts."
    import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq
    from mapo.pairs import MESSAGES
    rng, size = np.random.default_rng(0), 100_000
    letters = ''.join(rng.choice(list('0123456789+-*=() abcdefgh\n'), size=2**20))
    writers = {}

    def write(name, table):
        if name not in writers:
            writers[name] = pq.ParquetWriter(folder/f'{name}.parquet', table.schema, compression='zstd')
        writers[name].write_table(table)

    for start in range(0, n, size):
        i = np.arange(start, min(n, start+size))
        sample, agent, problem = i % SAMPLES, i//SAMPLES % len(AGENTS), i//SAMPLES//len(AGENTS)
        words = np.where((rng.random(len(i)) < REPEATED) & (sample > 0), i-1, i) # who wrote this text first
        text = [f'{w:07d}' + letters[w*7919 % 2**19:][:900 + w % 187] for w in words]
        ids = [f'{j*2654435761 % 2**64:016x}' for j in i.tolist()]
        contexts = [f'c{c:015d}' for c in i//SAMPLES]
        name = np.array(AGENTS)[agent]
        write('turns', pa.table(dict(
            turn_id=ids, context_id=contexts, problem_id=[f'p{p:07d}' for p in problem], split=['train']*len(i),
                                     purpose=['train']*len(i),
            iteration=np.ones(len(i), int), round=np.zeros(len(i), int), seat=agent, agent=name,
                                     role=['generator']*len(i), sample=sample,
            parent_ids=pa.array([[]]*len(i), pa.list_(pa.string())), text=text,
                                     finish_reason=np.where(i % 50, 'stop', 'length'),
            prompt_tokens=i*0+60, completion_tokens=i*0+TOKENS, seed=i,
            sampling_key=['t1']*len(i), model_key=[f'{a}-0123456789ab' for a in name],
            tokens=tokens(rng, len(i)), tokenizer=['0123456789abcdef']*len(i))))
        value = (words*2654435761 >> 7) % 2
        for score, values, label in (('correct', value.astype(float), None), ('answer', value*np.nan, '42')):
            write('scores', pa.table(dict(turn_id=ids, name=[score]*len(i), value=values,
                                          label=pa.array([label]*len(i), pa.string()), scorer_key=['gold-1']*len(i))))
        first = sample == 0
        asked = [[dict(role='user', content=f'{c}: ' + letters[j % 2**19:][:300])]
                 for j, c in zip(i[first], np.array(contexts)[first])]
        write('contexts', pa.table(dict(context_id=np.array(contexts)[first], messages=pa.array(asked, MESSAGES))))
    for writer in writers.values(): writer.close()


def tokens(rng, n):
    "The ids that `n` turns were sampled as."
    import numpy as np, pyarrow as pa
    ids = rng.integers(0, 128_000, n*TOKENS, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, n*TOKENS+1, TOKENS, dtype=np.int32)), pa.array(ids))


def measure(folder, each):
    "Read, build pairs of `each` right and `each` wrong answers, write; print a line of JSON."
    import pandas as pd, pyarrow.parquet as pq
    from mapo.pairs import Selection, hashed, hybrid_pairs, to_arrow
    from mapo.rewards import with_scores
    spent, pairs = dict(read=0., scores=0., texts=0., pairs=0., write=0., kernel=0.), 0

    def timed(part, function, *args):
        start = os.times()
        result = function(*args)
        user, system = os.times().user - start.user, os.times().system - start.system
        spent[part] += user + system
        if part not in ('read', 'write'): spent['kernel'] += system
        return result

    read = lambda name: pq.read_table(folder/f'{name}.parquet').to_pandas(ignore_metadata=True)
    turns, scores, contexts = (timed('read', read, name) for name in ('turns', 'scores', 'contexts'))
    turns = timed('scores', with_scores, turns, scores, 'correct')
    turns = timed('texts', hashed, turns)
    for agent in AGENTS:
        built = timed('pairs', hybrid_pairs, turns, contexts, agent,
                      Selection(n_positives=each, n_negatives=each, n_pairs=2*each))
        pairs += len(built.table)
        timed('write', lambda: pq.write_table(to_arrow(built.table), folder/f'pairs-{agent}.parquet',
                                              compression='zstd', row_group_size=2**16))
        del built
    peak = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))*1024
    print(json.dumps(dict(spent, turns=len(turns), n_pairs=pairs, peak=peak)))


def check(folder):
    "TRL reads the file: columns, types, and a chat template applied."
    os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1')
    import datasets, pandas as pd
    from trl import is_conversational
    data = datasets.load_dataset('parquet', data_files=str(folder/'pairs-ada.parquet'), cache_dir=str(folder/'cache'),
                                 split='train')
    assert is_conversational(data[0]) and data[0]['chosen'][0]['role'] == 'assistant'
    assert data[0]['prompt'][0]['role'] == 'user'
    frame = pd.read_parquet(folder/'pairs-ada.parquet')
    assert len(frame) == len(data)
    assert (frame.chosen.iloc[-1][0]['content'],
            *frame.chosen_id[:1]) == (data[-1]['chosen'][0]['content'], data[0]['chosen_id'])
    print(f'datasets {datasets.__version__} reads {len(data):,} rows, and TRL calls them conversational')


def alone(task, folder, *args):
    "Run a function of this file in a process of its own."
    done = subprocess.run([sys.executable, __file__, '--task', task, str(folder), *map(str, args)], capture_output=True,
                          text=True)
    if done.returncode: sys.exit(f'{task} failed: {done.stderr.strip()}')
    return done.stdout.strip()


def report(rows, command, read_by):
    "The rows as Markdown."
    import pandas, pyarrow
    lines = ['# From scored turns to pairs', '',
             f'`{command}`', '',
             'Mars-PO pairs (everybody\'s right answers x own wrong ones) for three agents: 2 x 2 answers '
             f'and 4 pairs a problem, as the experiment takes; last line: 4 x 4 and 8 pairs. {SAMPLES} '
             f'answers a problem and agent, with texts of 907 to 1,093 bytes and the ids of {TOKENS} tokens, '
             f'{REPEATED:.0%} of them repeated. CPU-seconds of all threads, in a fresh process per size.', '',
             '| turns | pairs | join scores | read texts once | build pairs | **beyond I/O** '
             '| of it in the kernel | x a tenth of the turns | read | write | peak memory |',
             '|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|']
    for previous, r in zip([None, *rows], rows):
        ratio = f"{r['work']/previous['work']:.1f}" if previous and previous['turns']*10 == r['turns'] else ''
        lines.append(f"| {r['turns']:,} | {r['n_pairs']:,} | {r['scores']:.2f} s | {r['texts']:.2f} "
                     f"s | {r['pairs']:.2f} s | **{r['work']:.2f} s** | {r['kernel']:.2f} s | "
                     f"{ratio} | {r['read']:.2f} s | {r['write']:.2f} s | {r['peak']/1e9:.2f} GB |")
    largest = rows[-2]
    verdict = 'kept' if largest['work'] < LIMITS['cpu'] and largest['peak'] < LIMITS['gb']*1e9 else 'BROKEN'
    return '\n'.join([*lines, '', f"Limits for 1,000,000 turns, {LIMITS['cpu']} s beyond I/O and "
                                  f"{LIMITS['gb']} GB: {verdict} at {largest['turns']:,} turns and "
                                  f"{largest['n_pairs']:,} pairs. With twice the pairs: "
                                  f"{rows[-1]['work']:.1f} s, {rows[-1]['work']-rows[-1]['kernel']:.1f} s "
                                  "of it outside the kernel. The kernel's part is memory that is touched "
                                  f"for the first time, and varies with the machine. {read_by}.", '',
                      f"Python {platform.python_version()}, pandas {pandas.__version__}, pyarrow "
                      f"{pyarrow.__version__}, {os.cpu_count()} cores, {platform.machine()}, "
                      f"load average {os.getloadavg()[0]:.1f} at the end."])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--turns', type=int, nargs='+', default=[10_000, 100_000, 1_000_000],
                        help='sizes, the smallest first')
    parser.add_argument('--out', type=Path, help='write the result here too, as Markdown')
    parser.add_argument('--task', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return dict(generate=generate, measure=measure,
                    check=check)[args.task[0]](Path(args.task[1]), *map(int, args.task[2:]))
    rows = []
    for n in args.turns:
        with tempfile.TemporaryDirectory() as scratch:
            alone('generate', scratch, n)
            for each in (2, 4)[:1 + (n == max(args.turns))]:
                r = json.loads(alone('measure', scratch, each))
                r |= dict(work=r['scores']+r['texts']+r['pairs'])
                rows.append(r)
                print(f"{n:,} turns, {r['n_pairs']:,} pairs: {r['work']:.2f} s beyond I/O, {r['peak']/1e9:.2f} GB",
                      flush=True)
            read_by = alone('check', scratch) if n == min(args.turns) else read_by
    result = report(rows, ' '.join(['python benchmarks/pairs.py', *sys.argv[1:]]), read_by)
    print(result)
    if args.out: args.out.write_text(result+'\n')


if __name__ == '__main__': main()
