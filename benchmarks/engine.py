"""TransformersEngine beside plain `generate`, on the same prompts, in one run.

    python benchmarks/engine.py [MODEL] [--prompts 512] [--max-tokens 80]

MODEL is what `mapo.agents.Model` takes as a path; the default ships with mapo. Every way of sampling draws one answer
for each prompt at temperature 1. Tokens are those of the answers, up to and including the end token; padding after it
does not count. Best of three passes each, interleaved, so that a noisy minute hits all of them.
"""
import argparse, time

import pandas as pd
import torch

from mapo.agents import Model
from mapo.engines import Request, Sampling, TransformersEngine, load_model
from mapo.tables import formatted, markdown
from mapo.tiny import ROLES, tiny_problems


def questions(n): return [ROLES['generator'].format(question=q) for q in tiny_problems(n).question]


def answer_tokens(out, eos):
    return sum(int((row == eos).int().argmax())+1 if (row == eos).any() else len(row) for row in out)


def plain(net, tokenizer, texts, max_tokens, batch):
    "What the documentation of transformers shows: pad on the left, sample, batch by batch."
    total = 0
    for i in range(0, len(texts), batch):
        inputs = tokenizer(texts[i:i+batch], return_tensors='pt', padding=True, add_special_tokens=False).to(net.device)
        with torch.inference_mode():
            out = net.generate(**inputs, do_sample=True, temperature=1., top_k=0, max_new_tokens=max_tokens,
                               pad_token_id=tokenizer.pad_token_id)
        total += answer_tokens(out[:, inputs['input_ids'].shape[1]:], tokenizer.eos_token_id)
    return total


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('model', nargs='?', default='tiny:products')
    parser.add_argument('--prompts', type=int, default=512)
    parser.add_argument('--max-tokens', type=int, default=80)
    args = parser.parse_args()
    model = Model('benchmark', args.model)
    net,tokenizer = load_model(model)
    messages = [[dict(role='user', content=q)] for q in questions(args.prompts)]
    texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    engine = TransformersEngine(model, progress=False)
    requests = [Request(tuple(m), seed=i) for i, m in enumerate(messages)]

    def ours(requests=requests):
        return sum(c.completion_tokens for cs in engine.generate(requests, Sampling(max_tokens=args.max_tokens))
                   for c in cs)
    few = min(32, args.prompts)
    ways = {'one prompt at a time': lambda: plain(net, tokenizer, texts[:few], args.max_tokens, 1),
            **{f'plain batches of {b}': lambda b=b: plain(net, tokenizer, texts, args.max_tokens, b)
               for b in (32, 128, 512)},
            'TransformersEngine': ours}
    engine.generate(requests[:2], Sampling(max_tokens=2))
    rows = []
    for _ in range(3):
        for name, way in ways.items():
            torch.manual_seed(0)
            started,cpu = time.perf_counter(),time.process_time()
            tokens = way()
            rows.append(dict(way=name, tokens=tokens, wall=tokens/(time.perf_counter()-started),
                             cpu=tokens/(time.process_time()-cpu)))
    best = pd.DataFrame(rows).groupby('way', sort=False).max()
    table = pd.DataFrame(dict(tokens=best.tokens,
                              **{'tokens/s': best.wall.round(), 'tokens/CPU-s': best.cpu.round(),
                                 'ratio to one at a time': (best.wall/best.wall.iloc[0]).round(1)}))
    plain_best = best.wall[[w for w in ways if w.startswith('plain')]].max()
    print(markdown(formatted(table.reset_index())))
    print(f"\nTransformersEngine / best plain batches: {best.wall['TransformersEngine']/plain_best:.2f}; / one at a "
          f"time: {best.wall['TransformersEngine']/best.wall.iloc[0]:.1f}")
    print(f"{args.model}, {torch.get_num_threads()} thread(s), {net.device}, torch {torch.__version__}")



if __name__ == '__main__': main()
