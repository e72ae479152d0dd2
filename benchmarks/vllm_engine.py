"""mapo's VLLMEngine beside vLLM's own `LLM.generate`, beside transformers, and six adapters beside six models.

    python benchmarks/vllm_engine.py [MODEL] [--requests 48] [--samples 4] [--max-tokens 48] [--repeats 5] [--agents 6]

MODEL is what `mapo.agents.Model` takes as a path; the default ships with mapo. Each way of answering has a process of
its own. All are loaded and warmed up with other requests; then they answer the same requests (a context and several
samples each, seeded, in float32) in turns, one at a time, round after round. What is timed is one call with all
requests: for mapo from conversations to texts, for `LLM.generate` from token ids to texts. Memory is the private
memory of a way's processes together.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

from adapters import prepare # the benchmark beside this one

WAYS = {'LLM.generate': "vLLM's `LLM.generate`", 'VLLMEngine': 'mapo, `VLLMEngine`',
        'unseeded': 'mapo, `VLLMEngine`, without seeds', 'TransformersEngine': 'mapo, `TransformersEngine`'}
SHARED = dict(adapters='{n} adapters on one base', models='{n} models, one engine each')
TARGET = .05 # VLLMEngine may take so much longer than `LLM.generate`


def requests(args, shift=0):
    from mapo.engines import Request
    put = ((lambda q: f'<solve>{q}') if args.model.startswith('tiny:')
           else (lambda q: f'What is {q}? Think step by step.'))
    return [Request((dict(role='user',
                          content=put(f'{17*i % 8+2}*{29*i % 8+2}+{i % 8+2}*{(i+shift) % 8+2}-{i % 9+1}')),),
                    1000*i+shift, args.samples) for i in range(args.requests)]


def memory(): # bytes that this process and its children have for themselves
    import psutil
    own = psutil.Process()
    return sum(p.memory_full_info().uss for p in (own, *own.children(recursive=True)))


def serve(load, answer, close, args):
    "Load and warm up, then answer all requests whenever a line comes, and say how many tokens that took how long."
    say = lambda *what: print('\nRESULT '+json.dumps(what), flush=True)
    start = time.perf_counter()
    engine = load()
    answer(engine, requests(args, 1)[:8])
    say(time.perf_counter()-start, memory())
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = answer(engine, requests(args))
        say(tokens, time.perf_counter()-start)
    close(engine)


def theirs(args):
    "vLLM alone, with the settings that mapo gives it."
    from vllm import LLM, SamplingParams
    from mapo.agents import Model
    from mapo.vllm import VLLMEngine
    ours = VLLMEngine(Model('model', args.model), window=args.window)
    def answer(llm, asked):
        prompts = [dict(prompt_token_ids=ids) for ids in ours._prompts([r.messages for r in asked])]
        params = [SamplingParams(n=r.n, seed=r.seed, max_tokens=args.max_tokens, temperature=1.,
                                 stop_token_ids=ours._end_tokens) for r in asked]
        return sum(len(a.token_ids) for out in llm.generate(prompts, params, use_tqdm=False) for a in out.outputs)
    serve(lambda: LLM(**ours._served.settings | dict(skip_tokenizer_init=False)), answer, lambda llm: None, args)


def ours(args, kind):
    from mapo.agents import Model
    from mapo.engines import Sampling, TransformersEngine
    from mapo.vllm import VLLMEngine
    model,how = Model('model', args.model), Sampling(max_tokens=args.max_tokens)
    load = (lambda: TransformersEngine(model, progress=False) if kind == 'TransformersEngine'
            else VLLMEngine(model, window=args.window, seeded=kind != 'unseeded', progress=False))
    serve(load, lambda engine, asked: sum(c.completion_tokens for cs in engine.generate(asked, how) for c in cs),
          lambda engine: engine.close(), args)


def shared(args, kind):
    "Agents take turns, each with its share of the requests."
    from mapo.agents import Model
    from mapo.engines import Sampling
    from mapo.vllm import VLLMEngine
    how,folder = Sampling(max_tokens=args.max_tokens), Path(args.folder)
    agents = [Model(f'agent{i}', args.model, adapter=str(folder/f'adapter-{i}')) if kind == 'adapters'
              else Model(f'agent{i}', str(folder/f'model-{i}')) for i in range(args.agents)]
    def load():
        made = [VLLMEngine(model, window=args.window, cache_gb=.1, progress=False)
                for model in (agents[:1] if kind == 'adapters' else agents)]
        return made*args.agents if kind == 'adapters' else made
    def answer(engines, asked):
        tokens = 0
        for i, (engine, model) in enumerate(zip(engines, agents)):
            assert engine.switch(model)
            tokens += sum(c.completion_tokens for cs in engine.generate(asked[i::args.agents], how) for c in cs)
        return tokens
    serve(load, answer, lambda engines: [engine.close() for engine in engines], args)


class Way:
    "One way of answering, in a process of its own."
    def __init__(self, argv, way, **more):
        given = [word for k, v in more.items() for word in (f'--{k}', str(v))]
        self.way,self.speed = way,[]
        self.process = subprocess.Popen([sys.executable, __file__, *argv, '--way', way, *given], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.loaded,self.memory = self.result()

    def result(self):
        return json.loads(next(line for line in self.process.stdout
                               if line.startswith('RESULT ')).removeprefix('RESULT '))

    def answer(self):
        print('go', file=self.process.stdin, flush=True)
        tokens,seconds = self.result()
        self.speed.append(tokens/seconds)
        print(f'{self.way}: {tokens/seconds:,.0f} tokens/s', file=sys.stderr, flush=True)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', nargs='?', default='tiny:base')
    for name, value in dict(requests=48, samples=4, max_tokens=48, repeats=5, agents=6, window=1024).items():
        parser.add_argument('--'+name.replace('_', '-'), type=int, default=value)
    parser.add_argument('--way', default='')
    parser.add_argument('--folder', default='')
    args = parser.parse_args()
    if args.way:
        if args.way == 'LLM.generate': return theirs(args)
        return shared(args, args.way) if args.way in SHARED else ours(args, args.way)
    argv = [args.model, *(w for k in ('requests', 'samples', 'max_tokens', 'window', 'agents')
                          for w in ('--'+k.replace('_', '-'), str(getattr(args, k))))]
    ways = [Way(argv, way) for way in WAYS]
    for _ in range(args.repeats):
        for way in ways: way.answer()
    for way in ways: way.close()
    first = ways[0].speed
    print('| way | tokens/s | range | times `LLM.generate`, round by round | to load and warm up, s | memory, MB '
          '|\n|---|---|---|---|---|---|')
    for way in ways:
        print(f"| {WAYS[way.way]} | {median(way.speed):,.0f} | {min(way.speed):,.0f} to {max(way.speed):,.0f} | "
              f"{median(a/b for a, b in zip(way.speed, first)):.2f} | {way.loaded:.0f} | {way.memory/1e6:,.0f} |")
    if args.agents:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), args.model, args.agents, 16)
            both = [Way(argv, way, folder=folder) for way in SHARED]
            for _ in range(args.repeats):
                for way in both: way.answer()
            for way in both: way.close()
        print('\n| agents held as | tokens/s | to load and warm up, s | memory, MB | times the models '
              '|\n|---|---|---|---|---|')
        for way in both:
            print(f"| {SHARED[way.way].format(n=args.agents)} | {median(way.speed):,.0f} | {way.loaded:.0f} | "
                  f"{way.memory/1e6:,.0f} | {way.memory/both[1].memory:.2f} |")
    from importlib.metadata import version
    from mapo.runs import vllm_version
    print(f"\n{args.requests} requests with {args.samples} samples, up to {args.max_tokens} tokens; {args.repeats} "
          f"rounds, medians; {os.cpu_count()} cores, {platform.machine()}, "
          f"load average {os.getloadavg()[0]:.1f} at the end; vLLM {vllm_version()}, torch {version('torch')}, "
          f"transformers {version('transformers')}.")


if __name__ == '__main__': main()
