"""What `make reproduce` costs after installation, and what it costs again.

    python benchmarks/reproduce.py [--preset tiny] [--arms core]

Runs the command twice in an empty folder for runs and counts the CPU-seconds of all processes, by stage from the
stages' own logs; what is left is everything else: starting Python and a kernel, papermill, tables, figures.
"""
import argparse, json, os, resource, subprocess, sys, tempfile
from collections import Counter
from pathlib import Path

ENGINE_AND_TRAINER = ('sample_alone', 'score_turns', 'tune_reward', 'tune_sft', 'tune_dpo')


def cpu_seconds(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def run(folder, *args):
    before = cpu_seconds()
    subprocess.run([str(Path(sys.executable).parent/'mapo'), 'run', 'mars_po', *args], check=True, capture_output=True,
                   env=os.environ | dict(MAPO_RUNS=str(folder), OMP_NUM_THREADS='1'))
    return cpu_seconds()-before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--preset', default='tiny')
    parser.add_argument('--arms', default='core')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first,again = (run(folder, '--preset', args.preset, '--arms', args.arms) for _ in range(2))
        stages = Counter()
        for log in Path(folder).glob('artifacts/*/log.json'): stages[log.parent.name.split('-')[0]] += json.loads(log.read_text())['cpu_s']
    outside = first-sum(stages[s] for s in ENGINE_AND_TRAINER)
    print(f'| `mapo run mars_po --preset {args.preset} --arms {args.arms}` | CPU-seconds | share |\n|---|---|---|')
    for name, seconds in stages.most_common(): print(f'| stage {name} | {seconds:.1f} | {seconds/first:.1%} |')
    print(f'| everything else | {first-stages.total():.1f} | {(first-stages.total())/first:.1%} |\n| the whole command | {first:.1f} | |')
    print(f'| outside engine and trainer | {outside:.1f} | {outside/first:.1%} |\n| the same command again | {again:.1f} | |')


if __name__ == '__main__': main()
