"""What `make reproduce` costs after installation, and what it costs again.

    python benchmarks/reproduce.py [mars_po multiagent_ft malt] [--preset tiny] [--arms core]

Runs each command twice in an empty folder for runs and counts the CPU-seconds of all processes, by stage from the
stages' own logs; what is left is everything else: starting Python and a kernel, papermill, tables, figures.
"""
import argparse, json, os, resource, subprocess, sys, tempfile
from collections import Counter
from pathlib import Path

ENGINE_AND_TRAINER = ('sample_alone', 'sample_debate', 'sample_chain', 'tell_refiner', 'measure_diversity', 'score_turns', 'tune_reward', 'tune_sft', 'tune_dpo')


def cpu_seconds(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def run(folder, *args): # CPU-seconds of one command
    before = cpu_seconds()
    subprocess.run([str(Path(sys.executable).parent/'mapo'), 'run', *args], check=True, capture_output=True,
                   env=os.environ | dict(MAPO_RUNS=str(folder), OMP_NUM_THREADS='1'))
    return cpu_seconds()-before


def measure(experiment, preset, arms):
    with tempfile.TemporaryDirectory() as folder:
        first,again = (run(folder, experiment, '--preset', preset, '--arms', arms) for _ in range(2))
        stages = Counter()
        for log in Path(folder).glob('artifacts/*/log.json'): stages[log.parent.name.split('-')[0]] += json.loads(log.read_text())['cpu_s']
    outside = first-sum(stages[s] for s in ENGINE_AND_TRAINER)
    print(f'| `mapo run {experiment} --preset {preset} --arms {arms}` | CPU-seconds | share |\n|---|---|---|')
    for name, seconds in stages.most_common(): print(f'| stage {name} | {seconds:.1f} | {seconds/first:.1%} |')
    print(f'| everything else | {first-stages.total():.1f} | {(first-stages.total())/first:.1%} |\n| the whole command | {first:.1f} | |')
    print(f'| outside engine and trainer | {outside:.1f} | {outside/first:.1%} |\n| the same command again | {again:.1f} | |\n', flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('experiments', nargs='*', default=['mars_po', 'multiagent_ft', 'malt'])
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--arms', default='core')
    args = parser.parse_args()
    for experiment in args.experiments: measure(experiment, args.preset, args.arms)


if __name__ == '__main__': main()
