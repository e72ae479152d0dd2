"""What `make reproduce` costs after installation, and what it costs again.

    python benchmarks/reproduce.py [mars_po multiagent_ft malt] [--preset tiny] [--arms core] [--processes 2]

Gives the command twice in an empty folder for runs, takes its time, and counts the CPU-seconds of all processes, by
stage from the runs' own records; what is left is everything else: starting Python and kernels, papermill, tables,
figures.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

ENGINE_AND_TRAINER = ('sample_alone', 'debate', 'sample_tree', 'tell_refiner', 'judge_pairs', 'measure_diversity',
                      'reward', 'train')


def cpu_seconds(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def run(folder, *args): # CPU-seconds and seconds of one command
    cpu, clock = cpu_seconds(), time.time()
    env = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'} | dict(MAPO_RUNS=str(folder))
    subprocess.run([str(Path(sys.executable).parent/'mapo'), 'run', *args], check=True, capture_output=True, env=env)
    return cpu_seconds()-cpu, time.time()-clock


def stages(folder, name): # CPU-seconds by stage
    [record] = Path(folder).glob(f'{name}-*/record.json')
    made = {s['key']: s for s in json.loads(record.read_text())['stages']}
    spent = Counter()
    for s in made.values(): spent[s['stage']] += s['cpu_s']
    return spent


def table(names, spent):
    every = [stage for stage, _ in sum(spent.values(), Counter()).most_common()]
    row = lambda title, cells: f"| {title} | {' | '.join(f'{c:.1f}' if c else '' for c in cells)} |"
    lines = [row(stage, [*(spent[n][stage] for n in names), sum(spent[n][stage] for n in names)]) for stage in every]
    totals = [sum(spent[n].values()) for n in names]
    head = [f"| CPU-seconds | {' | '.join(names)} | together |", '|---'*(len(names)+2)+'|']
    return '\n'.join([*head, *lines, row('all stages', [*totals, sum(totals)])])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('experiments', nargs='*', default=['mars_po', 'multiagent_ft', 'malt'])
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--arms', default='core')
    parser.add_argument('--processes', default='0')
    args = parser.parse_args()
    words = [*args.experiments, '--preset', args.preset, '--arms', args.arms, '--processes', args.processes]
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        (first, clock), (again, clock_again) = (run(folder, *words) for _ in range(2))
        spent = {name: stages(folder, name) for name in args.experiments}
    outside = first-sum(s[stage] for s in spent.values() for stage in ENGINE_AND_TRAINER)
    print(f"`mapo run {' '.join(words)}`, {os.cpu_count()} cores, load before {busy:.1f}\n")
    print(f'{table(args.experiments, spent)}\n')
    print(f'The whole command: {first:.0f} CPU-seconds in {clock:.0f} s.')
    print(f'Outside engine and trainer: {outside:.0f} CPU-seconds ({outside/first:.1%}).')
    print(f'The same command again: {again:.0f} CPU-seconds in {clock_again:.0f} s.')


if __name__ == '__main__': main()
