"""Free answers with a careful teacher's verdict: free_answers.txt, and others made from MATH-500's gold answers."""
import random, re
from pathlib import Path

STYLES = ['The answer is ${0}$.', r'So we get \boxed{{{0}}}.', r'Therefore \[ {0} \]', '**Final Answer**\n\n${0}$',
          r'Hence it is \({0}\).', '#### {0}',
          r'<think>Is it \boxed{{1}}? No.</think>The final answer is: $\boxed{{{0}}}$',
          r'$$\boxed{{{0}}}$$ I hope this helps.<|im_end|>']


def hand_written():
    "`(gold, text, right)`, judged by hand; the grader was mended until it agreed with all."
    return _read('free_answers.txt')


def later():
    "`(gold, text, right)`, judged by hand before a grader saw them: mended since (mapo was wrong on 13 of 61 then)."
    return _read('free_answers_later.txt')


def unseen():
    "`(gold, text, right)`, judged by hand; nothing was mended on these 73 (mapo was wrong on 4 of 75 at first)."
    return _read('free_answers_unseen.txt')


def _read(name):
    lines = (Path(__file__).parent/name).read_text().splitlines()
    rows = [(line[0], *line[2:].partition(' <- ')[::2]) for line in lines if line[:2] in ('+ ', '- ')]
    return [(gold, text.replace('⏎', '\n'), sign == '+') for sign, gold, text in rows]


def generated(golds, seed=0):
    "`(gold, text, right)`: each gold answer in the style of some model, and with one digit changed, so wrong."
    draw, rows = random.Random(seed), []
    for gold in golds:
        rows.append((gold, draw.choice(STYLES).format(gold), True))
        digits = [m.start() for m in re.finditer('[0-9]', gold)]
        if not digits: continue
        at = draw.choice(digits)
        changed = gold[:at] + str((int(gold[at]) + draw.randint(1, 8)) % 9 + 1) + gold[at+1:]
        if changed != gold: rows.append((gold, draw.choice(STYLES).format(changed), False))
    return rows
