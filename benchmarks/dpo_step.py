"""A DPO step of mapo beside plain TRL's with the same settings, and the reference as a table beside a reference model.

    OMP_NUM_THREADS=1 python benchmarks/dpo_step.py [--updates 60] [--repeats 5]

A random model of 0.2 M parameters, 16 pairs an update, float32 on one CPU thread. All ways train on the same pairs
(each trainer in its own seeded order) and take turns within one run, so that a noisy minute hits all of them.
CPU-seconds, not wall time; medians over the repeats, of ratios too: each is of two runs that followed one another.
`step` is the training loop divided by its updates; `whole` is the call with everything around it: loading,
tokenizing, the reference, saving.
"""
import argparse, contextlib, io, tempfile, time
from pathlib import Path

import datasets
import pandas as pd
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from mapo.agents import Model
from mapo.engines import load_model, save_model
from mapo.training import DPO, _quiet, reference_log_probabilities, train

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% else "
            "%}<bot>{{ "
            "m['content'] }}{{ eos_token }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}")


def make_model(folder):
    tokens = ['<pad>', '<s>', '</s>', '<user>', '<bot>', '\n', *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token='?'))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r'.|\n'), 'isolated'), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token='<pad>', bos_token='<s>', eos_token='</s>',
                                        additional_special_tokens=['<user>', '<bot>'])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=3,
                         max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0)
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return Model('bench', str(folder))


def make_pairs(n):
    say = lambda text, role='assistant': [{'role': role, 'content': text}]
    work = lambda a, b, c, e: say(f'{a}*{c}={a*c+e}\n{a*c+e}+{b}={a*c+e+b}\n#### {a*c+e+b}')
    return pd.DataFrame([dict(prompt=say(f'{a}*{c}+{b}=', 'user'), chosen=work(a, b, c, 0), rejected=work(a, b, c, 1))
                         for a, b, c in ((i*7 % 30, i*11 % 30, i % 10) for i in range(n))])


def plain_trl(model, pairs, settings, folder, precompute, **loss):
    "What TRL's documentation shows, the reference named."
    net,tokenizer = load_model(model, 'cpu')
    args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=settings.batch_size,
                     max_steps=settings.updates, learning_rate=settings.learning_rate,
                     beta=settings.beta, seed=settings.seed, logging_steps=1, report_to='none', disable_tqdm=True,
                     save_strategy='no',
                     use_cpu=True, bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=precompute,
                     **loss)
    trainer = DPOTrainer(net, None if precompute else load_model(model, 'cpu')[0], args, processing_class=tokenizer,
                         train_dataset=datasets.Dataset.from_pandas(pairs))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder))


def ours(model, pairs, settings, folder, cached):
    train(model, pairs, settings, folder, reference_log_probabilities(model, pairs, settings) if cached else model,
          progress=False)


def with_loop_time(way):
    "(CPU-seconds of the training loop, of the whole call)"
    loop,train = [],transformers.Trainer.train
    def timed(*args, **kwargs):
        start = time.process_time()
        try: return train(*args, **kwargs)
        finally: loop.append(time.process_time()-start)
    transformers.Trainer.train,start = timed,time.process_time()
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()): way()
    finally: transformers.Trainer.train = train
    return loop[0],time.process_time()-start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--updates', type=int, default=60)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    model,pairs,settings = make_model(work/'model'),make_pairs(320),DPO(learning_rate=1e-3, updates=args.updates)
    nll = DPO(learning_rate=1e-3, updates=args.updates, alpha=0.2)
    ways = {
        'TRL, precomputed reference': lambda f: plain_trl(model, pairs, settings, f, True),
        'mapo, reference as a table': lambda f: ours(model, pairs, settings, f, True),
        'TRL, precomputed reference, sigmoid + sft': lambda f: plain_trl(
            model, pairs, settings, f, True, loss_type=['sigmoid', 'sft'], loss_weights=[1., 0.2]),
        'mapo, reference as a table, alpha 0.2': lambda f: ours(model, pairs, nll, f, True),
        'TRL, reference model': lambda f: plain_trl(model, pairs, settings, f, False),
        'mapo, reference model': lambda f: ours(model, pairs, settings, f, False),
    }
    for way in ways.values(): with_loop_time(lambda: way(work/'warm'))
    rows = [(name, *with_loop_time(lambda: way(work/f'{i}-{j}'))) for i in range(args.repeats)
            for j, (name, way) in enumerate(ways.items())]
    table = pd.DataFrame(rows, columns=['way', 'loop', 'whole'])
    each = {name: g.reset_index(drop=True) for name, g in table.groupby('way', sort=False)}
    ratio = lambda a, b, what: (each[a][what]/each[b][what]).median()
    names = list(each)
    print('| way | ms per step | step / TRL | whole call, s | whole / TRL |\n|---|---|---|---|---|')
    for i, name in enumerate(names):
        base = names[i-i % 2]
        print(f"| {name} | {1000*each[name].loop.median()/args.updates:.1f} | {ratio(name, base, 'loop'):.2f} | "
              f"{each[name].whole.median():.2f} | {ratio(name, base, 'whole'):.2f} |")
    print(f"\ntable / reference model: step {ratio(names[1], names[5], 'loop'):.2f}, whole call "
          f"{ratio(names[1], names[5], 'whole'):.2f}")


if __name__ == '__main__': main()
