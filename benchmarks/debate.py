"What a debate costs beside the engine: contexts, templates, seeds and turns, with an engine that answers at once."
import argparse, cProfile, pstats, time

import pandas as pd

from mapo.agents import Agent, Model, Role, Team
from mapo.engines import Sampling, ScriptedEngine
from mapo.rewards import read_answers, vote
from mapo.sampling import debate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--problems', type=int, default=4000)
parser.add_argument('--seats', type=int, default=3)
parser.add_argument('--rounds', type=int, default=3)
parser.add_argument('--repeats', type=int, default=3)
parser.add_argument('--profile', action='store_true')
args = parser.parse_args()

QUESTION = (
    'A baker sells {} loaves in the morning and twice as many in the afternoon. How many loaves is that in a day?')
problems = pd.DataFrame(dict(problem_id=[f'p{i}' for i in range(args.problems)],
                             question=[QUESTION.format(i) for i in range(args.problems)], kind='number', split='train'))
model,seats = Model('m', 'tiny:base'),range(args.seats)
generators = Team('generators', [Agent(f'gen-{i}', model) for i in seats])
pasting = Team('critics', [Agent(f'crit-{i}', model,
                                 Role('critic', '{others}Answer again.', quote='One of the others said: {answer}\n\n'))
                           for i in seats])
reading = Team('critics', [Agent(f'crit-{i}', model,
                                 Role('critic', 'A summary of the others: {summary}\n\nAnswer again.')) for i in seats])
summarizer = Agent('summarizer', model, Role('summarizer', 'Sum up.\n\n{others}'))
engine = ScriptedEngine(
    lambda messages, seed: f'In the morning some, in the afternoon twice as many. That makes three times as many. '
                           f'#### {3*(seed % 4)}', window=4096)

def once(critics, summarizer):
    "CPU seconds of one debate, and how many turns it had."
    began = time.process_time()
    said = debate(problems, generators, critics, summarizer, args.rounds, lambda model: engine, Sampling(), 'train')
    return time.process_time()-began, said.turns

def show(name, critics, summarizer):
    "The best of some repetitions, as a row of the table."
    seconds,turns = min((once(critics, summarizer) for _ in range(args.repeats)), key=lambda r: r[0])
    print(f'| {name} | {len(turns):,} | {len(turns)/seconds:,.0f} |')
    return turns

if args.profile:
    profile = cProfile.Profile()
    profile.runcall(once, pasting, None)
    pstats.Stats(profile).sort_stats('tottime').print_stats(18)
else:
    print(f'{args.problems:,} problems, {args.seats} seats, {args.rounds} rounds, best of '
          f'{args.repeats}\n\n| debate | turns | turns per CPU second |\n|---|---|---|')
    turns = show('answers pasted', pasting, None)
    show('with summaries', reading, summarizer)
    answers = read_answers(turns, problems)
    turns = turns.assign(answer=answers.set_index('turn_id').label.reindex(turns.turn_id).to_numpy())
    print('\n| answers in the vote | CPU seconds | per answer, beside the row above |\n|---|---|---|')
    previous = None
    for share in (.25, .5, 1.):
        few = turns[turns.problem_id.isin(problems.problem_id[:int(share*len(problems))])]
        seconds = min(_t for _t in [(lambda b: (vote(few, problems), time.process_time()-b)[1])(time.process_time())
                                    for _ in range(args.repeats)])
        print(f"| {len(few):,} | {seconds:.3f} | {'' if previous is None else f'{seconds/len(few)/previous:.2f}'} |")
        previous = seconds/len(few)
