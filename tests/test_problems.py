"""Problems: real files, hub loading without a network, bad input, splits and leaks at full size."""
import json, os, subprocess, sys, time, warnings
from pathlib import Path

import pandas as pd
import pytest

from mapo.problems import (COLUMNS, arithmetic, check_leaks, commonsense_qa, drop_leaks, find_leaks, gsm8k, last_boxed,
                           math_500, math_problems, mmlu, read_jsonl, split_problems)

DATA = Path(os.environ.get('MAPO_SHARED_DATA', Path(__file__).resolve().parent.parent/'../shared/data'))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason='the folder of public data is absent')


def test_import_loads_no_heavy_library():
    code = ("import sys, mapo.problems, mapo.answers; print([m for m in ('torch', "
            "'transformers', 'trl', 'datasets', 'sympy') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout.strip() == '[]'


@needs_data
def test_real_files_load_in_the_common_columns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        tables = [gsm8k('train', DATA/'gsm8k/train.jsonl'), gsm8k('test', DATA/'gsm8k/test.jsonl'),
                  math_500(DATA/'math500/test.jsonl'),
                  math_problems('train', DATA/'math/train_levels_3_5.jsonl'),
                  commonsense_qa('dev', DATA/'csqa/dev_first_100.jsonl')]
    assert [len(t) for t in tables] == [7473, 1319, 500, 5585, 100]
    assert len(caught) == 1 and '2 problems of train_levels_3_5.jsonl' in str(caught[0].message)
    for t in tables:
        assert t.columns.tolist() == COLUMNS and t.problem_id.is_unique and (t.answer != '').all()


@needs_data
def test_leaks_of_gsm8k_are_found_in_seconds():
    problems = pd.concat([gsm8k('train', DATA/'gsm8k/train.jsonl'), gsm8k('test', DATA/'gsm8k/test.jsonl')],
                         ignore_index=True)
    start = time.process_time()
    leaks = find_leaks(problems)
    assert time.process_time() - start < 10
    assert set(zip(leaks.earlier_id, leaks.later_id)) == {('gsm8k/train/1314', 'gsm8k/test/602'),
                                                          ('gsm8k/train/5162', 'gsm8k/test/602'),
                                                          ('gsm8k/train/20', 'gsm8k/test/632')}
    assert len(check_leaks(drop_leaks(problems))) == len(problems) - 3


@needs_data
def test_a_copied_test_row_is_named():
    test = gsm8k('test', DATA/'gsm8k/test.jsonl')
    copied = test[7:8].assign(split='train', problem_id='copy', question=test.question[7].upper() + '  ')
    with pytest.raises(ValueError, match=r'copy \(train\) and gsm8k/test/7 \(test\), overlap 1.00'):
        check_leaks(pd.concat([copied, test]))


def test_generated_splits_never_meet_under_any_seed():
    seen = {}
    for seed in range(4):
        for row in arithmetic(1500, 500, 500, form='a*b+c*d-e', low=1, high=9, seed=seed).itertuples():
            assert seen.setdefault(row.problem_id, row.split) == row.split
    assert len(seen) > 5000


def test_commuted_expressions_share_a_split():
    problems = arithmetic(400, 130, 130, form='a*b+c*d', low=0, high=9)
    home = dict(zip(problems.problem_id.str.removeprefix('arithmetic/'), problems.split))
    for text, split in home.items():
        (a, b), (c, d) = (t.split('*') for t in text.split('+'))
        for other in (f'{b}*{a}+{c}*{d}', f'{c}*{d}+{a}*{b}', f'{d}*{c}+{b}*{a}'):
            assert home.get(other, split) == split


def test_generated_answers_and_negative_operands():
    problems = arithmetic(200, form='a-b*c+d', low=-5, high=5)
    assert all(eval(p.removeprefix('arithmetic/')) == int(a) for p, a in zip(problems.problem_id, problems.answer))
    assert problems.question.is_unique


def test_generated_problems_are_exactly_repeatable():
    first, second = arithmetic(50, 10, 10, seed=3), arithmetic(50, 10, 10, seed=3)
    pd.testing.assert_frame_equal(first, second)
    assert first.question[:3].tolist() == arithmetic(3, seed=3).question.tolist()


def test_everything_a_small_form_has_can_be_asked_for():
    with pytest.raises(ValueError) as error: arithmetic(100, 0, 0, form='a+b', low=0, high=9)
    n = int(str(error.value).split(', ')[1].split(' ')[0])
    assert n < 100 and arithmetic(n, form='a+b', low=0, high=9).question.nunique() == n


@pytest.mark.parametrize('content, message', [
    (b'{"question": "q", "answer": "#### 1"}\n{"question": "q', 'line 2 is not JSON'),
    (b'\n\n{"question": "q"}', "line 3 has no field 'answer'"),
    (b'{"question": 3, "answer": "#### 1"}', "line 1 field 'question' is int, not text"),
    (b'{"question": "", "answer": "#### 1"}', "line 1 field 'question' is empty"),
    (b'{"question": "q", "answer": "just 1"}', "does not end in '#### N'"),
    (b'{"question": "q\xff", "answer": "#### 1"}', 'line 1 is not UTF-8'),
    (b'[1, 2]', 'line 1 is list, not an object'),
    (b'{"question": "\\ud800", "answer": "#### 1"}', 'half a surrogate pair'),
    (b'[' * 100_000, 'line 1 is nested too deeply'),
    (b'{"question": "q", "answer": "#### 1", "answer": "#### 2"}', "line 1 says 'answer' twice"),
    (b'{"question": "q", "answer": "#### 1", "meta": {"a": 1, "a": 1}}', "line 1 says 'a' twice"),
    (b'{"question": "q", "answer": NaN}', "field 'answer' is nan"),
    (b'{"question": "q", "answer": true}', "field 'answer' is bool"),
    (b'{"question": "q", "answer": "#### 1"}\r{"question": "q"}\r', "line 2 has no field 'answer'"),
    (b'', 'holds no rows'),
    (b'null\n', 'line 1 is NoneType')])
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path/'bad.jsonl'
    path.write_bytes(content)
    with pytest.raises(ValueError) as error: gsm8k('train', path=path)
    assert message in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def test_absent_file_and_byte_order_mark(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl'): gsm8k(path=tmp_path/'nowhere.jsonl')
    (tmp_path/'bom.jsonl').write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_jsonl(tmp_path/'bom.jsonl') == [{'a': 1}]


def test_every_line_end_and_golds_that_are_numbers(tmp_path):
    rows = [b'{"question": "q\\r", "answer": 5}', b'{"question": "r", "answer": 27.0}',
            b'{"question": "s", "answer": "so #### 1,000"}']
    for end in (b'\n', b'\r\n', b'\r'):
        (tmp_path/'rows.jsonl').write_bytes(end.join(rows))
        assert gsm8k('test', tmp_path/'rows.jsonl')[['answer', 'solution']].values.tolist() == [
            ['5', ''], ['27.0', ''], ['1000', 'so #### 1,000']]
    (tmp_path/'math.jsonl').write_text('{"problem": "p", "answer": -2}\n{"problem": "q", "answer": ""}\n')
    with pytest.warns(UserWarning, match='1 problems'): assert math_500(tmp_path/'math.jsonl').answer.tolist() == ['-2']


HUB = {'openai/gsm8k': [dict(question='How many?', answer='so\n#### 1,000')],
       'EleutherAI/hendrycks_math': [dict(problem='p', level='Level 1', type='Algebra',
                                          solution=r'It is $\boxed{\frac{1}{2}}$.')],
       'HuggingFaceH4/MATH-500': [dict(problem='p', solution='s', answer='2', unique_id='test/algebra/1.json')],
       'tau/commonsense_qa': [dict(id='x', question='q', choices=dict(label=['A', 'B'], text=['a', 'b']),
                                   answerKey='B')],
       'cais/mmlu': [dict(question='q', subject='s', choices=['a', 'b', 'c', 'd'], answer=3)]}

def test_hub_formats(monkeypatch):
    import datasets
    calls = []
    def load(repo, config, split, revision):
        calls.append((repo, config, split))
        assert len(revision) == 40
        return datasets.Dataset.from_list(HUB[repo])
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert gsm8k('test').answer.tolist() == ['1000']
    assert math_problems('train').answer.tolist() == [r'\frac{1}{2}']*7
    assert math_500().problem_id.tolist() == ['math/test/algebra/1.json']
    assert commonsense_qa('dev').answer.tolist() == ['B'] and mmlu('dev').answer.tolist() == ['D']
    assert ('tau/commonsense_qa', None, 'validation') in calls and ('cais/mmlu', 'all', 'validation') in calls


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    import datasets
    def load(*_, **__): raise ConnectionError('no network\nTraceback and more')
    monkeypatch.setattr(datasets, 'load_dataset', load)
    with pytest.raises(ConnectionError, match='path= with a local JSON-lines file') as error: gsm8k()
    assert '\n' not in str(error.value)


def test_splits_drop_repeats_and_are_disjoint():
    pool = arithmetic(60, form='a*b-c', high=9)
    doubled = pd.concat([pool, pool.assign(problem_id=pool.problem_id + '/again', question=pool.question.str.upper())])
    split = split_problems(doubled, 40, 10, 10, seed=5)
    assert split.question.str.casefold().nunique() == 60
    assert split.split.value_counts().to_dict() == dict(train=40, dev=10, test=10)
    other = split_problems(doubled, 40, 10, 10, seed=6)
    assert set(split[split.split == 'test'].question) != set(other[other.split == 'test'].question)


def test_box_with_hostile_braces_is_found_in_linear_time():
    start = time.process_time()
    assert last_boxed(r'\boxed{' * 50_000) is None
    assert last_boxed(r'\boxed{' * 20_000 + '5' + '}' * 20_000) == '5'
    assert last_boxed(r'\boxed{7} and \boxed{\frac{1}{') == '7'
    assert time.process_time() - start < 5
