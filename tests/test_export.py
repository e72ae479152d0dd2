"What is passed on is read by plain transformers, peft, datasets and TRL; what cannot be passed on is refused."
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import disable_progress_bars, get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from mapo.cli import main
from mapo.experiment import compute, experiment
from mapo.export import check_hub, export_run, upload
from mapo.mars_po import MARS_PO
from mapo.runs import Run
from test_mars_po import SMALL

pytestmark = pytest.mark.xdist_group('mars_po') # beside the tests whose stages it passes on
disable_progress_bars()


def passed_on(root, out, arms, **overrides):
    "A finished run, its steps, and the folder that it was exported to."
    settings, run = MARS_PO.settings('smoke', **SMALL | overrides),Run('mars_po', dict(passed=overrides), root=root)
    experiment(run, MARS_PO, settings, arms, [0], 'dev')
    run.mark('finished')
    export_run(run.folder, out)
    return run, compute(run, MARS_PO, settings, 'mars_po', [0], 'dev'), out


@pytest.fixture(scope='module')
def whole(runs, tmp_path_factory):
    return passed_on(runs, tmp_path_factory.mktemp('whole')/'out', 'mars_po,sft_hybrid', reference='initial')


@pytest.fixture(scope='module')
def adapted(runs, tmp_path_factory):
    return passed_on(runs, tmp_path_factory.mktemp('adapted')/'out', 'mars_po', lora_rank=4, learning_rate=1e-3)


def greedy(net, folder, messages):
    "What a model says, asked as its card says, without chance."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    said = net.generate(**asked, do_sample=False, max_new_tokens=64)
    return tokenizer.decode(said[0, asked['input_ids'].shape[1]:], skip_special_tokens=True)


def recorded(steps, agent):
    "Conversations that the trained agent had in the run, and what it said in them without chance."
    turns = steps[-1].measured['greedy'][0]
    shown = turns.read('contexts').set_index('context_id').messages
    own = turns.read('turns').query('agent == @agent')
    return [([dict(m) for m in shown[context]], text) for context, text in zip(own.context_id, own.text)]


def test_a_checkpoint_says_in_plain_transformers_what_the_agent_said_in_the_run(whole):
    _, steps, out = whole
    assert sorted(p.name for p in out.iterdir()) == ['README.md', 'mars_po', 'sft_hybrid']
    for agent in ('products', 'borrows', 'carries'):
        net = AutoModelForCausalLM.from_pretrained(out/'mars_po'/agent)
        for messages, text in recorded(steps, agent):
            assert greedy(net, out/'mars_po'/agent, messages) == text


@pytest.mark.slow
def test_an_adapter_does_so_in_plain_peft_on_the_base_beside_it(adapted, monkeypatch):
    _, steps, out = adapted
    folder = out/'mars_po'/'borrows'
    monkeypatch.chdir(folder)
    base = json.loads(Path('adapter_config.json').read_text())['base_model_name_or_path']
    assert base == '../../base/borrows' and (folder/base/'README.md').exists()
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), '.')
    assert [greedy(net, folder, m) for m, _ in recorded(steps, 'borrows')] == [t for _, t in recorded(steps, 'borrows')]
    card = ModelCard.load('README.md')
    assert card.data.library_name == 'peft' and f"AutoModelForCausalLM.from_pretrained('{base}')" in card.text


def trained(kind, config, folder, data, tmp_path):
    "The weights' greatest change in one step of TRL, on what was passed on as it is."
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = [p.detach().clone() for p in net.parameters()]
    args = config(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3,
                  use_cpu=True, bf16=False, report_to='none', save_strategy='no', disable_tqdm=True,
                  gradient_checkpointing=False)
    trainer = kind(net, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1
    return max(float((p.detach()-b).abs().max()) for p, b in zip(trainer.model.parameters(), before))


def test_trl_takes_a_step_on_pairs_examples_and_turns_unchanged(whole, tmp_path):
    _, _, out = whole
    read = lambda arm, name: load_dataset(str(out/arm/'data'), name, split='train', cache_dir=str(tmp_path/'cache'))
    folder = out/'mars_po'/'borrows'
    assert trained(DPOTrainer, DPOConfig, folder, read('mars_po', 'borrows-dpo'), tmp_path) > 0
    for data in (read('sft_hybrid', 'borrows-sft'), read('mars_po', 'turns')):
        assert trained(SFTTrainer, SFTConfig, folder, data, tmp_path) > 0


def test_data_sets_hold_what_was_learnt_from(whole, tmp_path):
    run, steps, out = whole
    data = str(out/'mars_po'/'data')
    assert get_dataset_config_names(data) == ['turns', 'products-dpo', 'borrows-dpo', 'carries-dpo']
    read = lambda name: load_dataset(data, name, split='train', cache_dir=str(tmp_path/'cache')).to_pandas()
    fits = [(step.iteration, f) for step in steps for f in step.fits if f.learner == 'borrows']
    pairs = pd.concat([f.data.read('table').assign(iteration=i) for i, f in fits], ignore_index=True)
    mine = read('borrows-dpo')
    assert [c[0]['content'] for c in mine.chosen] == [c[0]['content'] for c in pairs.chosen]
    assert mine.iteration.tolist() == pairs.iteration.tolist() and set(mine.iteration) == {1, 2}
    turns, said = read('turns'),pd.concat([step.turns.read('turns') for step in steps[1:]], ignore_index=True)
    assert [c[0]['content'] for c in turns.completion] == said.text.tolist()
    assert turns.correct.isin([0, 1]).all() and turns.reward.notna().all()


def test_cards_say_how_it_was_made(whole):
    run, _, out = whole
    card = ModelCard.load(out/'mars_po'/'borrows'/'README.md')
    assert card.data.license == 'apache-2.0' and card.data.library_name == 'transformers'
    [result] = card.data.eval_results
    rows = pd.read_parquet(run.folder/'record'/'results.parquet').query(
        "arm == 'mars_po' and agent == 'borrows' and iteration == 2")
    assert result.metric_value == round(rows.c.sum()/rows.n.sum(), 4)
    spent = pd.read_csv(run.folder/'record'/'budget.csv').set_index('arm').loc['mars_po']
    assert f'sampled {spent.tokens_sampled:,} tokens' in card.text and f'took {spent.updates} updates' in card.text
    for words in (run.id, run.command, '`tiny:borrows`', 'beta=0.1', 'Apache-2.0', 'arXiv:2411.19039'):
        assert words in card.text, words
    data = DatasetCard.load(out/'mars_po'/'data'/'README.md')
    assert [c['config_name'] for c in data.data.to_dict()['configs']][0] == 'turns'


@pytest.mark.slow
def test_every_piece_goes_to_a_repository_of_its_own(adapted, tmp_path, monkeypatch):
    sent = []
    def base(folder):
        file = folder/'adapter_config.json'
        return json.loads(file.read_text())['base_model_name_or_path'] if file.exists() else ''
    send = lambda self, **asked: sent.append(asked | dict(base=base(asked['folder_path'])))
    monkeypatch.setattr(HfApi, 'create_repo', lambda self, **asked: sent.append(asked))
    monkeypatch.setattr(HfApi, 'upload_folder', send)
    run, _, _ = adapted
    pieces = export_run(run.folder, tmp_path/'out', ('mars_po',), hub='me/team')
    names = upload(tmp_path/'out', pieces, 'me/team')
    agents = ['products', 'borrows', 'carries']
    assert names == [*(f'me/team-base-{a}' for a in agents), *(f'me/team-mars_po-{a}' for a in agents),
                     'me/team-mars_po-data']
    assert all(asked['private'] for asked in sent[::2]) and [asked['repo_id'] for asked in sent[1::2]] == names
    assert [asked['repo_type'] for asked in sent[1::2]] == ['model']*6 + ['dataset']
    assert [asked['base'] for asked in sent[1::2]] == ['']*3 + names[:3] + ['']


def refused(words):
    with pytest.raises(SystemExit) as stopped: main(words)
    assert '\n' not in stopped.value.code
    return stopped.value.code


def test_without_a_token_or_a_network_the_hub_is_refused_before_anything_is_written(whole, tmp_path, monkeypatch):
    run, _, _ = whole
    ask = lambda: refused(['export', str(run.folder), '--to', 'hub:me/team'])
    monkeypatch.setattr('mapo.export.export_run', lambda *_, **__: pytest.fail('something was written'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE is set' in ask()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    assert 'no token of the hub is known here' in ask()
    monkeypatch.setattr('huggingface_hub.get_token', lambda: 'hf_x')
    def unreachable(self): raise HTTPError('no way there')
    monkeypatch.setattr(HfApi, 'whoami', unreachable)
    assert 'the hub cannot be reached, or does not know the token (HTTPError)' in ask()
    monkeypatch.setattr(HfApi, 'whoami', lambda self: dict(name='me'))
    check_hub('me/team')


@pytest.mark.parametrize('change,sentence', [
    (lambda run: run.mark('stopped'), 'is stopped: give its command again: mapo run mars_po'),
    (lambda run: (run.folder/'lineage.json').unlink(), 'was made before runs noted where their models come from'),
    (lambda run: (run.folder/'lineage.json').write_text('[]'), 'has no trained arms'),
    (lambda run: (run.folder/'record'/'results.parquet').unlink(), 'a grid of rates cannot be passed on')])
def test_what_cannot_be_passed_on_is_one_sentence(change, sentence, whole, tmp_path):
    run = Run('mars_po', dict(copy=sentence), root=tmp_path)
    shutil.copytree(whole[0].folder, run.folder, dirs_exist_ok=True)
    change(run)
    assert sentence in refused(['export', str(run.folder), '--to', str(tmp_path/'out')])
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('words,sentence', [
    (['--arm', 'base'], "there is no trained arm 'base'"), (['--arm', 'mars-po'], "did you mean 'mars_po'?"),
    (['--seed', '7'], 'there is no seed 7: there are 0')])
def test_wrong_arms_and_seeds_are_one_sentence_and_leave_nothing(words, sentence, whole, tmp_path):
    assert sentence in refused(['export', str(whole[0].folder), '--to', str(tmp_path/'out'), *words])
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(whole, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    assert 'is not empty' in refused(['export', str(whole[0].folder), '--to', str(tmp_path)])
    assert 'is a file' in refused(['export', str(whole[0].folder), '--to', str(tmp_path/'notes.txt')])
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_it_prints_where_everything_is(whole, tmp_path, capsys):
    main(['export', str(whole[0].folder), '--to', str(tmp_path/'out'), '--arm', 'sft_hybrid'])
    assert capsys.readouterr().out.splitlines() == [
        f'{tmp_path}/out/sft_hybrid/{name}  {kind}'
        for name, kind in (*((agent, 'checkpoint') for agent in ('products', 'borrows', 'carries')), ('data', 'data'))]
