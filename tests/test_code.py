"A stage knows the code that made it: what it can reach counts, what it cannot does not."
import ast
import importlib
import json
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

import mapo
from conftest import REPO
from mapo import experiment, malt, mars_po, methods, multiagent_ft, pairs, rewards, runs, sampling, tiny
from mapo.rewards import example_turns, grade
from mapo.runs import Run, StaleCode, code_behind, libraries_behind, own_hash, source_hash

# stage -> (a function that it calls through another one, a function that it never reaches)
STAGES = {
    methods.make_problems: ('problems.split_problems', 'sampling.sample_alone'),
    methods.draw_problems: ('rewards.seeded_draw', 'methods.benchmark'),
    sampling.sample_alone: ('sampling.plan_chunks', 'sampling.ask_critics'),
    sampling.debate: ('sampling._reply', 'sampling.ask_under'),
    sampling.sample_tree: ('sampling.plan_chunks', 'sampling.ask_critics'),
    rewards.grade: ('answers.Grader', 'rewards.vote'),
    rewards.majority: ('rewards.canonical_answers', 'rewards.grade'),
    rewards.reward: ('rewards.problem_facts', 'rewards.grade'),
    rewards.flip_labels: ('rewards.score_rows', 'rewards.grade'),
    rewards.bias_rewards: ('rewards.score_rows', 'rewards.grade'),
    experiment.check_cast: ('engines.template_faults', 'engines.uniforms'),
    rewards.second_opinions: ('answers.Grader', 'rewards.grade'),
    rewards.judge_turns: ('answers.extract_answer', 'rewards.grade'),
    pairs.own_positives: ('pairs.teach', 'pairs.cross'),
    pairs.hybrid_positives: ('pairs.with_mistakes', 'pairs.cross'),
    pairs.own_pairs: ('pairs.cross', 'pairs.teach'),
    pairs.own_turns: ('rewards.advantages', 'pairs.teach'),
    pairs.hybrid_pairs: ('pairs.winners', 'pairs.teach'),
    pairs.pooled_pairs: ('pairs.losers', 'pairs.teach'),
    pairs.reward_pairs: ('pairs.winners', 'pairs.own_contexts'),
    pairs.value_turns: ('rewards.parent_rows', 'pairs.winners'),
    methods.train: ('training.objective_tokens', 'methods.benchmark'),
    multiagent_ft.debate_examples: ('pairs.corrected_and_kept', 'multiagent_ft.learn'),
    multiagent_ft.judge_pairs: ('sampling.fit', 'multiagent_ft.learn'),
    multiagent_ft.measure_diversity: ('diversity.unit_vectors', 'multiagent_ft.learn'),
    malt.tell_refiner: ('sampling.fit', 'malt.learn'),
    malt.make_harder: ('problems._expressions', 'malt.learn'),
    malt.prompt_tokens: ('engines.local_folder', 'malt.learn'),
    tiny.make_agent: ('tiny._trained', 'tiny.tiny_agent'),
}
BY_NAME = {fn.__name__: fn for fn in STAGES}


def asked_for(module):
    "The functions that a module gives to `run.stage`."
    calls = [n for n in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(n, ast.Call)]
    asked = [n.args[0] for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr == 'stage' and n.args]
    return {vars(module)[n.id] for n in asked if isinstance(n, ast.Name) and n.id in vars(module)}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    "A copy of mapo's modules in which code is looked up instead: what a test edits there is lost."
    folder = Path(mapo.__file__).parent
    shutil.copytree(folder, tmp_path/'mapo', ignore=shutil.ignore_patterns('checkpoints', '__pycache__'))
    find = runs._file.__wrapped__
    def found(module):
        path = find(module)
        return tmp_path/path.relative_to(folder.parent) if path and path.is_relative_to(folder) else path
    monkeypatch.setattr(runs, '_file', found)
    forget()
    yield tmp_path
    forget()


def forget():
    "What was read of modules."
    for cached in (runs._module, runs._behind, runs._digest_of, runs._code_at): cached.cache_clear()


def edit(root, name, change):
    "Change the definition called `module.name`: `change` takes its source."
    module, _, name = name.partition('.')
    path = root/'mapo'/f'{module}.py'
    text = path.read_text()
    [node] = [n for n in ast.parse(text).body if getattr(n, 'name', '') == name]
    old = ast.get_source_segment(text, node)
    assert text.count(old) == 1
    path.write_text(text.replace(old, change(old)))
    forget()


def parts(source): # what stands before and after the place of a docstring
    node = ast.parse(source).body[0]
    lines = source.splitlines(keepends=True)
    return ''.join(lines[:node.body[0].lineno-1]), ''.join(lines[node.body[0].lineno-1:])


def other_code(source):
    "The same function with one more statement."
    before, after = parts(source)
    indent = ' '*(len(after) - len(after.lstrip()))
    return f'{before}{indent}edited = 1\n{after}' if before else source.replace(': return', ': edited = 1; return', 1)


def other_words(source):
    "The same code with another docstring and a comment."
    tree = ast.parse(source)
    said = ast.get_docstring(tree.body[0], clean=False)
    return (source.replace(said, 'Other words.') if said else source) + ' # a remark'


def test_every_stage_is_in_the_table():
    "Under a name of its own, since a key begins with it."
    used = set().union(*map(asked_for, (experiment, mars_po, multiagent_ft, malt)))
    used |= {arm.data for arm in mars_po.ARMS if arm.data} | {pairs.own_positives, pairs.own_pairs, rewards.judge_turns}
    assert used == set(STAGES) and len(BY_NAME) == len(STAGES)


@pytest.mark.parametrize('near', STAGES, ids=lambda fn: fn.__name__)
def test_a_stage_notices_what_it_reaches_and_nothing_else(near, sources):
    far = STAGES[near]
    before = source_hash(near)
    for place in far: edit(sources, place, other_words)
    assert source_hash(near) == before, 'a comment or a docstring'
    edit(sources, far[1], other_code)
    assert source_hash(near) == before, far[1]
    edit(sources, far[0], other_code)
    assert source_hash(near) != before, far[0]


def test_what_a_stage_calls_is_among_what_it_reaches():
    "Looked at from the other side: the functions of mapo that really run while a debate's answers are graded."
    turns = example_turns(dict(ann=dict(p1=['so #### 8', '#### 9']), bob=dict(p1=['\\boxed{7}', 'none'])))
    problems = pd.DataFrame(dict(problem_id=['p1'], kind=['number'], answer=['8'], question=['?']))
    called = set()
    def watch(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == 'call' and file.parent == Path(mapo.__file__).parent:
            called.add(f'mapo.{file.stem}.{frame.f_code.co_qualname.partition(".")[0]}')
    sys.setprofile(watch)
    try: grade(turns, problems)
    finally: sys.setprofile(None)
    assert len(called) > 5 and called <= set(code_behind(grade)), called - set(code_behind(grade))


PACKAGE = {
    '__init__': '',
    'low': 'FACTOR = 2\ndef twice(x): return FACTOR*x\ndef idle(x): return x\n',
    'table': 'KNOWN = {}\nKNOWN["a"] = 1\ndef read(): return KNOWN["a"]\n',
    'shape': 'from . import low\nclass Base:\n    rate = 3\nclass Shape(Base):\n    def size(self, x): return '
             'low.twice(x)*self.rate\n',
    'top': '''
        from .shape import Shape
        from functools import lru_cache
        import example_code.table as tables
        @lru_cache
        def stage(draft, *, x):
            from example_code import low
            return Shape().size(low.twice(x)) + tables.read()
        ''',
}
EDITS = [('low', 'FACTOR = 2', 'FACTOR = 3', True), ('low', 'return x\n', 'return -x\n', False),
         ('shape', 'rate = 3', 'rate = 4', True),
         ('table', '= 1', '= 2', True), ('top', 'lru_cache\n', 'lru_cache # kept\n', False)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A user's package with every way of using a name."
    (tmp_path/'example_code').mkdir()
    for name, text in PACKAGE.items(): (tmp_path/'example_code'/f'{name}.py').write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    runs._file.cache_clear()
    forget()
    yield tmp_path/'example_code'
    for name in [m for m in sys.modules if m.partition('.')[0] == 'example_code']: del sys.modules[name]
    runs._file.cache_clear()
    forget()


@pytest.mark.parametrize('module, old, new, noticed', EDITS)
def test_both_forms_of_import_constants_tables_and_bases(package, module, old, new, noticed):
    from example_code.top import stage as fn
    before = own_hash(fn)
    path = package/f'{module}.py'
    path.write_text(path.read_text().replace(old, new))
    forget()
    assert (own_hash(fn) != before) == noticed


def test_a_users_stage_has_another_key_when_its_code_differs(tmp_path):
    def numbers(factor):
        def made(n): return pd.DataFrame(dict(x=[factor*n]))
        return made
    run = Run('own', {}, root=tmp_path)
    assert run.stage(numbers(2), n=1).key != run.stage(numbers(3), n=1).key == run.stage(numbers(3), n=1).key


def test_a_function_as_an_input(tmp_path):
    "mapo's own is keyed by name, as its code is recorded; a user's by its code."
    def mine(x): return x
    assert runs.canonical(methods.benchmark) == dict(function='mapo.methods.benchmark')
    before = runs.canonical(mine)
    def mine(x): return x+1
    assert runs.canonical(mine) != before
    assert 'mapo.problems.split_problems' in runs._code_of(methods.make_problems, dict(how=(methods.benchmark,)))


def test_libraries_are_found_in_the_code():
    "Those that do a stage's arithmetic, through helpers, inner imports and other processes."
    arithmetic = lambda fn: libraries_behind(fn) & set(runs.ARITHMETIC)
    assert arithmetic(grade) == {'math_verify'} and arithmetic(pairs.hybrid_pairs) == set()
    assert {'torch', 'transformers', 'trl', 'peft'} <= arithmetic(methods.train)
    assert 'torch' in arithmetic(methods.Serving) and 'torch' not in arithmetic(sampling.debate)
    def mine(turns):
        import trl
        return turns
    assert arithmetic(mine) == {'trl'}


def test_an_objective_of_ones_own_is_keyed_by_its_code():
    from mapo.objectives import SFT
    def own(factor):
        @dataclass(frozen=True)
        class Scaled(SFT):
            def loss(self, batch): return factor*super().loss(batch)
        return Scaled()
    assert runs.canonical(own(2)) != runs.canonical(own(3)) and runs.canonical(own(2)) == runs.canonical(own(2))
    assert 'source' not in runs.canonical(SFT())


def test_stale_code_is_named(tmp_path, monkeypatch, capsys):
    run = Run('stale', {}, root=tmp_path)
    def graded(n):
        from mapo.rewards import grade
        return pd.DataFrame(dict(x=[n]))
    monkeypatch.delenv('MAPO_STRICT', raising=False)
    run.stage(graded, n=1)
    digest = runs._digest_of
    monkeypatch.setattr(runs, '_digest_of',
                        lambda *place: '0'*16 if place == ('mapo.answers', 'extract_answer') else digest(*place))
    run.stage(graded, n=1)
    assert "made by other code than today's (answers.extract_answer changed): --fresh graded" in capsys.readouterr().err
    monkeypatch.setenv('MAPO_STRICT', '1')
    with pytest.raises(StaleCode, match='answers.extract_answer changed'): run.stage(graded, n=1)


def test_records_made_by_other_code_say_so():
    "A record whose stages have other code today stands in figures/record/README.md as such, and only such a one."
    page = (REPO/'figures'/'record'/'README.md').read_text()
    said = dict(re.findall(r'^\| (\w+) \| [^|]+ \| [^|]* \| (\w+)', page, re.M))
    today = {name: {source_hash(fn)} for name, fn in BY_NAME.items()}
    for manifest in sorted((REPO/'figures'/'record').glob('*/manifest.json')):
        code = json.loads(manifest.read_text()).get('code', {})
        same = bool(code) and all(set(found) == today.get(stage) for stage, found in code.items())
        if 'run' in json.loads(manifest.read_text()):
            assert said.get(manifest.parent.name) == ('same' if same else 'other'), manifest.parent.name
