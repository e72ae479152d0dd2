"""Six agents as LoRA adapters on one base, beside one model and beside six: memory, time to load and speed.

    python benchmarks/adapters.py [MODEL] [--agents 6] [--rank 16] [--repeats 3] [--no-training]

MODEL is what `mapo.agents.Model` takes as a path; the default ships with mapo. Six adapters (all linear layers of
attention and MLP) are written beside six full models, which are the base with one of the adapters merged in. Each way
of holding agents gets a process of its own. Its private resident memory is read after the imports, after loading, and
after every agent has answered sixteen questions twice; what it grew by since the imports is what the agents cost.
Pages of mapped files count, memory that was freed does not. Training is measured in the same way, and by its peak.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

TARGET = 1.25 # times one model's memory, from the project's plan
WAYS = dict(one='one model', adapters='{n} adapters on one base', models='{n} models')
TRAININGS = dict(full='all weights of one model', adapter='one adapter', adapters='{n} adapters, one after the other')
MB = 1e6


def private(): # bytes
    "Memory that is this process's alone."
    import ctypes, gc, psutil
    gc.collect()
    if sys.platform == 'linux': ctypes.CDLL(None).malloc_trim(0) # glibc keeps what was freed; it is nobody's
    return psutil.Process().memory_full_info().uss


def resident(): # bytes
    "Memory that is in RAM, shared libraries included."
    import psutil
    return psutil.Process().memory_info().rss


def peak(): # bytes
    "The most that was resident, since the process began."
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def prepare(folder, path, agents, rank):
    "Write adapters with small random matrices, and the models they become when merged."
    import torch
    from peft import LoraConfig, get_peft_model
    from mapo.agents import Model
    from mapo.engines import load_model, save_model
    for i in range(agents):
        net,tokenizer = load_model(Model('base', path), 'cpu')
        torch.manual_seed(i)
        net = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules='all-linear',
                                             task_type='CAUSAL_LM'))
        for name, w in net.named_parameters():
            if 'lora_B' in name: torch.nn.init.normal_(w, std=.01)
        net.save_pretrained(folder/f'adapter-{i}')
        save_model(net.merge_and_unload(), tokenizer, folder/f'model-{i}')
    return net.num_parameters(), sum(f.stat().st_size for f in (folder/'adapter-0').glob('*.safetensors'))//4


def requests():
    from mapo.engines import Request
    return [Request((dict(role='user', content=f'What is {17*i % 90+10} + {29*i % 90+10}?'),), seed=i)
            for i in range(16)]


def measure(way, folder, path, agents):
    "Load the agents, let each answer; print a line of JSON."
    import torch, peft
    from mapo.agents import Model
    from mapo.engines import Sampling, TransformersEngine
    models = dict(one=[Model('base', path)],
                  adapters=[Model(f'agent-{i}', path, adapter=str(folder/f'adapter-{i}')) for i in range(agents)],
                  models=[Model(f'agent-{i}', str(folder/f'model-{i}')) for i in range(agents)])[way]
    asked,sampling = requests(),Sampling(temperature=0, max_tokens=24)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before,at_first = private(),resident()
    for model in models: model_key_of(model)
    start = time.perf_counter()
    if way == 'models': engines = [TransformersEngine(m, 'cpu', progress=False) for m in models]
    else: engines = [TransformersEngine(models[0], 'cpu', progress=False)]*len(models)
    for engine, model in zip(engines, models): load(engine, model)
    loading,loaded = time.perf_counter()-start,private()
    switching,answering,tokens = 0.,0.,0
    for turn in range(2): # the first one warms up
        for engine, model in zip(engines, models):
            began = time.perf_counter()
            assert way == 'models' or engine.switch(model)
            between = time.perf_counter()
            completions = engine.generate(asked, sampling)
            if turn:
                switching = switching+between-began
                answering = answering+time.perf_counter()-between
                tokens = tokens+sum(c[0].completion_tokens for c in completions)
    print(json.dumps(dict(imports=before, loaded=loaded-before, answered=private()-before, peak=peak()-at_first,
                          loading=loading, switch=switching/len(models), speed=tokens/answering)))


def model_key_of(model):
    "Hash the files beforehand: every way does it once, and it is no part of loading."
    from mapo.agents import model_key
    return model_key(model)


def load(engine, model):
    "Have `model` in memory: the first one is opened, the others are switched to."
    if engine._net is None: engine._open()
    else: assert engine.switch(model)


def train(way, folder, path, agents, rank):
    "Train on sixteen short examples, one at a time so that the batch weighs little; print a line of JSON."
    import torch
    import pandas as pd
    from mapo.agents import Model
    from mapo.training import SFT, train
    examples = pd.DataFrame([dict(prompt=list(r.messages),
                                  completion=[dict(role='assistant', content='That is easily said: '*4 + str(r.seed))])
                             for r in requests()])
    settings = SFT(batch_size=4, micro_batch_size=1, updates=3, learning_rate=1e-5,
                   lora_rank=0 if way == 'full' else rank)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before,at_first,after,start = private(),resident(),[],time.perf_counter()
    for i in range(agents if way == 'adapters' else 1):
        train(Model(f'agent-{i}', path), examples, settings, folder/f'trained-{way}-{i}', progress=False)
        after.append(private()-before)
    print(json.dumps(dict(imports=before, first=after[0], last=after[-1], peak=peak()-at_first,
                          seconds=(time.perf_counter()-start)/len(after))))


def alone(*arguments): # in a process of its own
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | dict(HF_HUB_OFFLINE='1'))
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def median(results): # of each number
    import pandas as pd
    return pd.DataFrame(results).median()


def holding(args, folder):
    "A row per way of holding agents."
    import pandas as pd
    found = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS: found[way].append(alone(args.model, '--way', way, '--folder', folder, '--agents', args.agents))
    results = {way: median(rows) for way, rows in found.items()}
    one,rows = results['one'],[]
    for way, r in results.items():
        rows.append({'agents held as': WAYS[way].format(n=args.agents), 'after loading, MB': f'{r.loaded/MB:,.0f}',
                     'after answers of each, MB': f'{r.answered/MB:,.0f}',
                     'times one model': f'{r.answered/one.answered:.2f}', 'peak, MB': f'{r.peak/MB:,.0f}',
                     'whole process, MB': f'{(r.imports+r.answered)/MB:,.0f}',
                     'loading, s': f'{r.loading:.2f}',
                     'a switch, ms': f'{1000*r.switch:.1f}' if way == 'adapters' else '',
                     'tokens/s': f'{r.speed:,.0f}'})
    return (pd.DataFrame(rows), results['adapters'].answered/one.answered, [r['answered'] for r in found['adapters']],
            one)


def training(args, folder, one):
    "A row per way of training agents."
    import pandas as pd
    rows = []
    for way, name in TRAININGS.items():
        r = pd.Series(alone(args.model, '--way', f'train-{way}', '--folder', folder, '--agents', args.agents, '--rank',
                            args.rank))
        rows.append({'training': name.format(n=args.agents), 'peak, MB': f'{r.peak/MB:,.0f}',
                     'times one model at rest': f'{r.peak/one.answered:.2f}',
                     'kept after the first, MB': f'{r["first"]/MB:,.0f}',
                     'kept after the last, MB': f'{r["last"]/MB:,.0f}', 's each': f'{r.seconds:.1f}'})
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('model', nargs='?', default='tiny:base')
    parser.add_argument('--agents', type=int, default=6)
    parser.add_argument('--rank', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--no-training', action='store_true')
    parser.add_argument('--way', help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way and args.way.startswith('train-'):
        return train(args.way[6:], args.folder, args.model, args.agents, args.rank)
    if args.way: return measure(args.way, args.folder, args.model, args.agents)
    import torch, transformers, peft
    from mapo.tables import markdown
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size,extra = prepare(folder, args.model, args.agents, args.rank)
        table,ratio,spread,one = holding(args, folder)
        lines = [f'{size/1e6:,.1f} M parameters, float32; rank {args.rank} on all linear layers, '
                 f'{extra/1e6:,.2f} M parameters an adapter ({extra/size:.1%} of the base).',
                 '', markdown(table), '',
                 f'{args.agents} adapters in at most {TARGET} times the memory of one model: '
                 f'{"kept" if ratio <= TARGET else "MISSED"} at {ratio:.2f} (over the repeats '
                 f'{min(spread)/one.answered:.2f} to {max(spread)/one.answered:.2f}); the '
                 f'matrices alone would be {1+args.agents*extra/size:.2f}.']
        if not args.no_training: lines += ['', markdown(training(args, folder, one))]
    lines += ['', f'{args.repeats} repeats, interleaved, medians (training: once); '
                  f'{torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {platform.machine()}, '
                  f'load average {os.getloadavg()[0]:.1f} at the end; torch {torch.__version__}, '
                  f'transformers {transformers.__version__}, peft {peft.__version__}.']
    print('\n'.join(lines))


if __name__ == '__main__': main()
