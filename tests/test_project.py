"The repository keeps its promises: notebooks are clean, exported and light; nothing names this machine; pins hold."
import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import nbformat
import pytest
import tomllib
from packaging.requirements import Requirement

from conftest import REPO, command, tracked
from docs import readme

NOTEBOOKS = sorted(p for p in tracked() if p.suffix == '.ipynb')
PAPERS = [p for p in NOTEBOOKS if p.parent.name == 'papers']
CHECKPOINT = ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
              'chat_template.jinja']
TORCH = ['torch', 'transformers', 'trl', 'datasets']

# what a committed output must not hold
TIMING = re.compile(r'\d\s?(it/s|s/it|tok(en)?s?/s)\b|\d+%\|.*\||Wall time|CPU times|per loop|<\d\d:\d\d')
WARNING = re.compile(r'\b\w*Warning:|^WARNING', re.M)
MACHINE = re.compile(r'''(?<![\w.~/-])/(home|root|tmp|work|opt|Users|mnt|private|var|media)/\w''')
MACHINE_HERE = re.compile(r'''(?<![\w.~/:-])/(root|tmp|work|opt)/\w''')
HOSTS = re.compile('|'.join(['py' + r'pi\.org', 'python' + r'hosted\.org', 'npm' + r'js\.(org|com)',
                             'debian' + r'\.org', 'unp' + 'kg', 'js' + 'delivr']))
OTHER_MAPO = re.compile('pip install ' + r'mapo(?![-\w])')


def read(path): return nbformat.read(REPO/path, as_version=4)


def texts(output):
    "The texts of a cell's output: pictures are left out."
    data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/png')}
    return [str(output.get('text', ''))] + [v if isinstance(v, str) else json.dumps(v) for v in data.values()]


def outputs(notebook): return [o for c in notebook.cells for o in c.get('outputs', [])]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=str)
def test_outputs_are_for_readers(path):
    "No errors, warnings, progress bars, timings, widgets or paths of somebody's machine."
    notebook = read(path)
    assert 'widgets' not in notebook.metadata
    for output in outputs(notebook):
        assert output.output_type != 'error', f'{path}: {output.get("evalue")}'
        assert output.get('name') != 'stderr', f'{path} writes to stderr: {output.text[:300]}'
        assert not [k for k in output.get('data', {}) if 'widget' in k], f'{path} shows a widget'
        for text in texts(output):
            for rule in (TIMING, WARNING, MACHINE):
                found = rule.search(text)
                assert not found, (
                    f'{path} has {found[0]!r} in an output: ...{text[max(0, found.start()-80):found.end()+80]}...')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=str)
def test_notebook_opens_with_title_and_subtitle_alone(path):
    "nbdev makes the first Markdown cell the page's head, and drops what else is in it from the site."
    first = next(c for c in read(path).cells if c.cell_type == 'markdown')
    head = re.fullmatch(r'# .+\n+> .+(\n+- \w+: .+)*', first.source.strip())
    assert head, f'{path}: its first Markdown cell is not "# Title" and "> subtitle" alone: {first.source[:200]!r}'


@pytest.mark.parametrize('path', PAPERS, ids=str)
def test_paper_notebook_has_one_parameters_cell(path):
    "papermill would silently run the defaults without it; nbdev_test would run the whole paper without `skip_exec`."
    notebook = read(path)
    tagged = [c for c in notebook.cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1 and tagged[0].cell_type == 'code'
    assert re.search(r'^-? ?skip_exec: *true', notebook.cells[0].source,
                     re.M), f'{path}: no skip_exec in the first cell'


def test_paper_notebooks_ship_with_the_package():
    assert {p.name for p in files('mapo.notebooks').iterdir()} >= {p.name for p in PAPERS}


def test_checkpoints_ship_whole_and_small():
    folders = [p for p in files('mapo').joinpath('checkpoints').iterdir() if p.is_dir()]
    assert folders, 'no checkpoint ships with the package'
    for folder in folders: assert not set(CHECKPOINT) - {p.name for p in folder.iterdir()}, folder.name
    size = sum(p.stat().st_size for folder in folders for p in folder.rglob('*') if p.is_file())
    assert size < 8e6, f'the checkpoints have {size/1e6:.1f} MB, over 8'


def test_clean_and_export_change_nothing(copy):
    "The committed notebooks are clean and the modules are what they export."
    before = {p: (copy/p).read_bytes() for p in tracked()}
    for tool in ('nbdev_clean', 'nbdev_export'):
        code, output = command(tool, cwd=copy, PYTHONPATH=str(copy))
        assert code == 0, output
    changed = [str(p) for p, content in before.items() if (copy/p).read_bytes() != content]
    assert not changed, f'nbdev_clean or nbdev_export change {", ".join(changed)}: run both and commit'


def test_readme_is_the_index_notebook():
    assert (REPO/'README.md').read_text() == readme(REPO/'nbs'/'index.ipynb'), 'run `make docs` and commit README.md'


def test_readme_is_short_and_its_results_are_those_of_the_record():
    "Every difference that its sentences name stands in a committed table of comparisons or claims."
    text = (REPO/'README.md').read_text()
    assert len(text.splitlines()) < 150
    results = text.partition('## Results')[2].partition('## How')[0]
    prose = [line for line in results.splitlines() if line[:1] not in '|!']
    named = set(re.findall(r'[−.\d]+ \[[−.\d]+, [−.\d]+\]', '\n'.join(prose)))
    tables = ''.join(p.read_text() for p in (REPO/'figures').glob('*/c[ol]*s.md'))
    assert named and not [n for n in named if n not in tables]


def test_papers_pages_hold_no_number_of_a_run():
    "A repeated run cannot make their prose wrong: what they say of results is written by code."
    for name in ('mars_po', 'multiagent_ft', 'malt'):
        for cell in read(Path('nbs')/'papers'/f'{name}.ipynb').cells:
            found = re.search(r'(?<![\w.])[−-]?\.\d\d\d?\b|\[[−.\d]+, [−.\d]+\]', cell.source)
            assert cell.cell_type != 'markdown' or not found, f'{name}, cell {cell.id}: {found[0]}'


def test_citation_and_workflow_say_what_the_project_says():
    import yaml
    cited = yaml.safe_load((REPO/'CITATION.cff').read_text())
    assert cited['version'] == re.search(r'^version = (.+)', (REPO/'settings.ini').read_text(), re.M)[1]
    papers = re.findall(r'https://arxiv[^)]+', (REPO/'README.md').read_text())
    assert {r['url'] for r in cited['references']} <= {*papers}
    steps = yaml.safe_load((REPO/'.github'/'workflows'/'ci.yml').read_text())['jobs']['test']['steps']
    assert [s['run'] for s in steps if 'run' in s] == ['.ci/run']
    for form in (REPO/'.github'/'ISSUE_TEMPLATE').glob('*.yml'):
        assert {'name', 'description', 'body'} <= yaml.safe_load(form.read_text()).keys(), form.name


def numbers():
    "Module -> the number of its notebook."
    return {m[1]: p.stem.split('_')[0] for p in NOTEBOOKS if p.parent.name == 'api'
            if (m := re.search(r'^#\| *default_exp (\w+)', '\n'.join(c.source for c in read(p).cells), re.M))}


def imported(module):
    "The modules of mapo that a module imports anywhere, also inside functions."
    for node in ast.walk(ast.parse((REPO/'mapo'/f'{module}.py').read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('mapo')):
            name = (node.module or '').removeprefix('mapo').lstrip('.')
            yield from [name.split('.')[0]] if name else [a.name for a in node.names]
        if isinstance(node, ast.Import):
            yield from [a.name.split('.')[1] for a in node.names if a.name.startswith('mapo.')]


def test_imports_run_one_way():
    "A module imports only from notebooks with lower numbers."
    number = numbers()
    for module in number:
        for name in (n for n in imported(module) if n in number and n != module):
            assert number[name] < number[module], f'{number[module]}_{module} imports {number[name]}_{name}'


def test_looking_at_runs_needs_no_torch():
    "Only engines, vllm and training import torch, transformers, trl or datasets when they are imported."
    light = sorted(set(numbers()) - {'engines', 'vllm', 'training'})
    code = f'import sys, importlib\nfor m in {light}:\n importlib.import_module("mapo." + m)\n' \
           f' heavy = [t for t in {TORCH} if t in sys.modules]\n if heavy: sys.exit(f"mapo.{{m}} imports {{heavy}}")'
    returncode, output = command(sys.executable, '-c', code, cwd=REPO)
    assert returncode == 0, output


def code_lines(path):
    "(place, line) of a module's or a notebook's code; nbdev's list of what a module exports is no code."
    if path.suffix == '.ipynb':
        return [(f'{path} cell {cell.id} line {i}', line) for cell in read(path).cells if cell.cell_type == 'code'
                for i, line in enumerate(cell.source.splitlines(), 1)]
    text = (REPO/path).read_text()
    if path.parts[0] == 'mapo':
        text = re.sub(r'^__all__ = \[.*?\]', lambda m: '\n'*m[0].count('\n'), text, count=1, flags=re.M | re.S)
    return [(f'{path} line {i}', line) for i, line in enumerate(text.splitlines(), 1)]


def test_code_has_at_most_120_columns():
    paths = [p for p in tracked() if p.suffix in ('.py', '.ipynb') and p.name != '_modidx.py']
    assert {p.parts[0] for p in paths} >= {'mapo', 'nbs', 'tests', 'benchmarks', 'tools'}
    long = [f'{place} has {len(line)} columns' for path in paths for place, line in code_lines(path) if len(line) > 120]
    assert not long, '; '.join(long)


def test_nothing_names_a_registry_or_this_machine():
    found = []
    for path in tracked():
        try: text = (REPO/path).read_text()
        except UnicodeDecodeError: continue
        if path.suffix == '.ipynb': text = re.sub(r'"image/png": "[^"]+"', '', text)
        found += [f'{path} has {m[0]!r}' for rule in (HOSTS, MACHINE_HERE, OTHER_MAPO) if (m := rule.search(text))]
    assert not found, '; '.join(found)


def requirements(extras):
    project = tomllib.loads((REPO/'pyproject.toml').read_text())['project']
    return [Requirement(r) for r in project['dependencies']
            + [r for name, asked in project['optional-dependencies'].items() if extras is None or name in extras
               for r in asked]]


def test_every_requirement_is_pinned_and_installed():
    "The extras of GPU servers are pinned, too; they are not installed here."
    lines = [line.strip() for name in ('constraints.txt', 'constraints-gpu.txt')
             for line in (REPO/name).read_text().splitlines()]
    pins = {Requirement(line).name.lower().replace('_', '-'): line.partition('==')[2] for line in lines if line
            and line[0] not in '#-'}
    here = {r.name for r in requirements(['dev'])}
    for requirement in requirements(None):
        pin = pins.get(requirement.name.lower().replace('_', '-'))
        assert pin and requirement.specifier.contains(pin), f'{requirement} has no pin that fits in constraints.txt'
        if requirement.name in here:
            assert version(requirement.name).partition('+')[0] == pin, (
                f'{requirement.name} {version(requirement.name)} is installed, {pin} is pinned')


def git(*arguments): return subprocess.run(['git', *arguments], cwd=REPO, capture_output=True, text=True)


GRIDS = sorted(p.name.removesuffix('_rates') for p in (REPO/'figures'/'record').glob('*_rates'))


def commit_of(record): return json.loads((REPO/'figures'/'record'/record/'manifest.json').read_text())['commit']


@pytest.mark.parametrize('paper', GRIDS)
def test_a_grid_of_rates_says_whether_it_came_before_the_test_run(paper):
    "The order that a page tells is that of the commits in the two manifests, where the history is at hand."
    grid, run = commit_of(f'{paper}_rates'), commit_of(paper)
    if any(git('cat-file', '-e', f'{commit}^{{commit}}').returncode for commit in (grid, run)):
        pytest.skip('the history is not at hand')
    cells = read(Path('nbs')/'papers'/f'{paper}_rates.ipynb').cells
    page = '\n'.join(c.source for c in cells if c.cell_type == 'markdown')
    for commit in (grid, run):
        time = git('show', '-s', '--format=%ad', '--date=format:%H:%M', commit).stdout.strip()
        assert f'commit `{commit[:7]}` of {time}' in page, f'{commit[:7]} is of {time}'
    before, after = (git('merge-base', '--is-ancestor', *pair).returncode == 0 for pair in ((grid, run), (run, grid)))
    assert before != after, 'one commit is the ancestor of the other'
    said = re.findall(r'this grid was made \*\*(before|after)\*\* the test run', page)
    assert said == ['before' if before else 'after'] and not re.search(r'[Bb]efore \[?the experiment', page)


def test_every_mutation_still_breaks_a_line():
    "What `tests/mutations.py` breaks occurs once in its module."
    from mutations import MUTATIONS
    for m in MUTATIONS: assert (REPO/'mapo'/f'{m.module}.py').read_text().count(m.old) == 1, m.what
