"""mapo's VLLMEngine beside vLLM's own `LLM.generate`, beside transformers, and six adapters beside six models.

    python benchmarks/vllm_engine.py [MODEL] [--requests 48] [--samples 4] [--max-tokens 48] [--repeats 3] [--agents 6]

MODEL is what `mapo.agents.Model` takes as a path; the default ships with mapo. Each way of answering runs in a process of
its own, one after the other and then all again, on the same requests (a context and several samples each, seeded), in
float32. What is timed is one call with all requests: for mapo from conversations to texts, for `LLM.generate` from token
ids to texts. A first call with other requests warms up. Memory is the private memory of a way's processes together.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

WAYS = {'LLM.generate': "vLLM's `LLM.generate`", 'VLLMEngine': 'mapo, `VLLMEngine`', 'unseeded': 'mapo, `VLLMEngine`, without seeds', 'TransformersEngine': 'mapo, `TransformersEngine`'}
SHARED = dict(adapters='{n} adapters on one base', models='{n} models, one engine each')
TARGET = .05 # VLLMEngine may take so much longer than `LLM.generate`


def requests(args, shift=0):
    from mapo.engines import Request
    put = (lambda q: f'<solve>{q}') if args.model.startswith('tiny:') else (lambda q: f'What is {q}? Think step by step.')
    return [Request((dict(role='user', content=put(f'{17*i % 8+2}*{29*i % 8+2}+{i % 8+2}*{(i+shift) % 8+2}-{i % 9+1}')),), 1000*i+shift, args.samples) for i in range(args.requests)]


def memory(): # bytes that this process and its children have for themselves
    import psutil
    own = psutil.Process()
    return sum(p.memory_full_info().uss for p in (own, *own.children(recursive=True)))


def timed(call):
    start = time.perf_counter()
    tokens = call()
    return tokens, time.perf_counter()-start


def theirs(args):
    "vLLM alone, with the settings that mapo gives it."
    from vllm import LLM, SamplingParams
    from mapo.agents import Model
    from mapo.engines import load_tokenizer
    from mapo.vllm import VLLMEngine
    model = Model('model', args.model)
    tokenizer,engine = load_tokenizer(model), VLLMEngine(model, window=args.window)
    settings = engine._served.settings | dict(skip_tokenizer_init=False)
    start = time.perf_counter()
    llm = LLM(**settings)
    loaded = time.perf_counter()-start
    def answer(asked):
        prompts = [dict(prompt_token_ids=ids) for ids in engine._prompts([r.messages for r in asked])]
        params = [SamplingParams(n=r.n, seed=r.seed, max_tokens=args.max_tokens, temperature=1., stop_token_ids=[tokenizer.eos_token_id]) for r in asked]
        return sum(len(a.token_ids) for out in llm.generate(prompts, params, use_tqdm=False) for a in out.outputs)
    answer(requests(args, 1)[:8])
    return [timed(lambda: answer(requests(args))) for _ in range(2)], loaded, memory()


def ours(args, kind):
    from mapo.agents import Model
    from mapo.engines import Sampling, TransformersEngine
    from mapo.vllm import VLLMEngine
    model,how = Model('model', args.model), Sampling(max_tokens=args.max_tokens)
    engine = TransformersEngine(model, progress=False) if kind == 'TransformersEngine' else VLLMEngine(model, window=args.window, seeded=kind != 'unseeded', progress=False)
    answer = lambda asked: sum(c.completion_tokens for cs in engine.generate(asked, how) for c in cs)
    _,loaded = timed(lambda: answer(requests(args, 1)[:8]))
    found = [timed(lambda: answer(requests(args))) for _ in range(2)], loaded, memory()
    engine.close()
    return found


def shared(args, kind):
    "Agents take turns, each with its share of the requests."
    from mapo.agents import Model
    from mapo.engines import Sampling
    from mapo.vllm import VLLMEngine
    how,folder = Sampling(max_tokens=args.max_tokens), Path(args.folder)
    if kind == 'adapters':
        agents = [Model(f'agent{i}', args.model, adapter=str(folder/f'adapter-{i}')) for i in range(args.agents)]
        engines = [VLLMEngine(agents[0], window=args.window, cache_gb=.5, progress=False)]*args.agents
    else: engines = [VLLMEngine(Model(f'agent{i}', str(folder/f'model-{i}')), window=args.window, cache_gb=.5, progress=False) for i in range(args.agents)]
    def answer(asked):
        tokens = 0
        for i, engine in enumerate(engines):
            if kind == 'adapters': assert engine.switch(agents[i])
            tokens += sum(c.completion_tokens for cs in engine.generate(asked[i::args.agents], how) for c in cs)
        return tokens
    _,loaded = timed(lambda: answer(requests(args, 1)[:args.agents]))
    found = [timed(lambda: answer(requests(args))) for _ in range(2)], loaded, memory()
    for engine in set(engines): engine.close()
    return found


def prepare(folder, path, agents, rank=16):
    "Adapters with small random matrices, and the models they become when merged."
    import torch
    from peft import LoraConfig, get_peft_model
    from mapo.agents import Model
    from mapo.engines import load_model, save_model
    for i in range(agents):
        net,tokenizer = load_model(Model('base', path), 'cpu')
        torch.manual_seed(i)
        net = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules='all-linear', task_type='CAUSAL_LM'))
        for name, w in net.named_parameters():
            if 'lora_B' in name: torch.nn.init.normal_(w, std=.01)
        net.save_pretrained(folder/f'adapter-{i}')
        save_model(net.merge_and_unload(), tokenizer, folder/f'model-{i}')


def measured(argv, way, **more):
    "One way in a process of its own."
    given = [word for k, v in more.items() for word in (f'--{k}', str(v))]
    out = subprocess.run([sys.executable, __file__, *argv, '--way', way, *given], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | dict(PYTHONWARNINGS='ignore')).stdout
    times,loaded,used = json.loads(next(line for line in out.splitlines() if line.startswith('RESULT ')).removeprefix('RESULT '))
    tokens,seconds = times[-1]
    print(f'{way}: {tokens/seconds:,.0f} tokens/s, {loaded:.0f} s to load, {used/1e6:,.0f} MB', file=sys.stderr, flush=True)
    return dict(speed=[t/s for t, s in times], tokens=tokens, loaded=loaded, memory=used)


def middle(found, what): return median(x for f in found for x in (f[what] if isinstance(f[what], list) else [f[what]]))


def spread(found): return min(x for f in found for x in f['speed']), max(x for f in found for x in f['speed'])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', nargs='?', default='tiny:base')
    for name, value in dict(requests=48, samples=4, max_tokens=48, repeats=3, agents=6, window=1024).items(): parser.add_argument('--'+name.replace('_', '-'), type=int, default=value)
    parser.add_argument('--way', default='')
    parser.add_argument('--folder', default='')
    args = parser.parse_args()
    if args.way: return print('\nRESULT '+json.dumps(theirs(args) if args.way == 'LLM.generate' else shared(args, args.way) if args.way in SHARED else ours(args, args.way)))
    argv = [args.model, *(w for k in ('requests', 'samples', 'max_tokens', 'window', 'agents') for w in ('--'+k.replace('_', '-'), str(getattr(args, k))))]
    found = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS: found[way].append(measured(argv, way))
    first = middle(found['LLM.generate'], 'speed')
    print('| way | tokens/s | range | times `LLM.generate` | to load and warm up, s | memory, MB |\n|---|---|---|---|---|---|')
    for way, title in WAYS.items():
        f = found[way]
        print(f"| {title} | {middle(f, 'speed'):,.0f} | {spread(f)[0]:,.0f} to {spread(f)[1]:,.0f} | {middle(f, 'speed')/first:.2f} | {middle(f, 'loaded'):.0f} | {middle(f, 'memory')/1e6:,.0f} |")
    if args.agents:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), args.model, args.agents)
            both = {way: [measured(argv, way, folder=folder)] for way in SHARED}
        base = middle(both['models'], 'memory')
        print('\n| agents held as | tokens/s | to load, s | memory, MB | times the models |\n|---|---|---|---|---|')
        for way, title in SHARED.items():
            f = both[way]
            print(f"| {title.format(n=args.agents)} | {middle(f, 'speed'):,.0f} | {middle(f, 'loaded'):.0f} | {middle(f, 'memory')/1e6:,.0f} | {middle(f, 'memory')/base:.2f} |")
    from importlib.metadata import version
    from mapo.runs import vllm_version
    print(f"\n{args.requests} requests with {args.samples} samples, up to {args.max_tokens} tokens; {args.repeats} repeats of two calls, interleaved, medians; {os.cpu_count()} cores, {platform.machine()}, "
          f"load average {os.getloadavg()[0]:.1f} at the end; vLLM {vllm_version()}, torch {version('torch')}, transformers {version('transformers')}.")


if __name__ == '__main__': main()
