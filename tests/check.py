"""What a change touches, in a minute: `make check`, or `python tests/check.py [REVISION]`.

The change is what differs from the merge base with REVISION (main, where none is given), uncommitted and new files
included. A module is checked by its notebook and by the tests named after it, or, where none is, by the tests that
import it; a test file by itself; a paper's notebook by its smoke run and by its published record. The project's own
checks are always among them. Tests marked `slow` are left to `make test`.
"""
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ALWAYS = ['tests/test_project.py', 'tests/test_make.py']
# files of the package that are no module of a notebook
ELSEWHERE = {'mapo/launch': 'training', 'mapo/checkpoints': 'tiny', 'mapo/__init__.py': '', 'mapo/_modidx.py': ''}
BESIDE = {'training': ['launch']} # a module's further test files
OTHERS = {'nbs/servers': 'tests/test_servers.py', 'nbs/katex': 'tests/test_docs.py',
          'nbs/_quarto.yml': 'tests/test_docs.py', 'nbs/styles.css': 'tests/test_docs.py',
          'tools': 'tests/test_docs.py', 'tests/browser.py': 'tests/test_docs.py',
          'pyproject.toml': 'tests/test_wheel.py',
          'tests/warm.py': 'tests/test_notebooks.py::test_notebook_runs[02_agents]'}


def git(*args):
    done = subprocess.run(['git', *args], cwd=REPO, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ''


def changed(revision):
    "Paths that differ from the merge base, as text."
    base = next((b for r in (revision, f'origin/{revision}') if (b := git('merge-base', 'HEAD', r))), '')
    if not base:
        sys.exit(f'check: git knows neither {revision!r} nor origin/{revision}, so what has '
                 'changed cannot be told; name a revision: python tests/check.py REVISION')
    found = git('diff', '--name-only', '-z',
                base).split('\0') + git('ls-files', '-o', '--exclude-standard', '-z').split('\0')
    return sorted({p for p in found if p})


def modules():
    "Module -> the stem of its notebook."
    export = re.compile(r'#\| *default_exp (\w+)')
    return {m[1]: p.stem for p in sorted((REPO/'nbs'/'api').glob('*.ipynb'))
            if (m := export.search(p.read_text(encoding='utf-8')))}


def imported(path):
    "The modules of mapo that a test file imports anywhere."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'mapo':
            yield from [node.module.split('.')[1]] if '.' in node.module else [a.name for a in node.names]


def tests_of(module):
    "The tests named after a module, or those that import it."
    own = [p for name in (module, *BESIDE.get(module, ())) if (p := REPO/'tests'/f'test_{name}.py').exists()]
    return own or [p for p in sorted((REPO/'tests').glob('test_*.py')) if module in imported(p)]


def beneath(path, table): return next((table[p] for p in table if path == p or path.startswith(f'{p}/')), None)


def drawn(name):
    "What checks the figures of a record, and the notebook that shows it."
    if not (REPO/'figures'/'record'/name/'manifest.json').exists(): return []
    return [f'tests/test_figures.py::test_figures_are_what_the_record_draws[{name}]',
            *([f'tests/test_figures.py::test_a_paper_shows_its_record[{name}]']
              if (REPO/'nbs'/'papers'/f'{name}.ipynb').exists() else [])]


def chosen(path, known):
    "What checks a changed file, as pytest takes it."
    folder, _, name = path.rpartition('/')
    stem = name.partition('.')[0]
    if path.startswith('mapo/') or folder == 'nbs/api':
        module = beneath(path, ELSEWHERE)
        if module is None: module = next((m for m, notebook in known.items() if notebook == stem), stem)
        return [f'tests/test_notebooks.py::test_notebook_runs[{known[module]}]',
                *(f'tests/{p.name}' for p in tests_of(module))] if module in known else []
    if folder == 'tests' and stem.startswith('test_'): return [path] if (REPO/path).exists() else []
    if folder == 'nbs/papers' and name.endswith('.ipynb'):
        return [f'tests/test_papers.py::test_paper_notebook_runs[{stem}]', *drawn(stem)[1:]]
    if path.startswith('figures/'):
        return drawn(path.removeprefix('figures/').removeprefix('record/').partition('/')[0])
    notebook = ([f'tests/test_notebooks.py::test_notebook_runs[{stem}]']
                if path.startswith('nbs/') and name.endswith('.ipynb') else [])
    return notebook + [o for o in [beneath(path, OTHERS)] if o]


def main():
    paths, known = changed(*sys.argv[1:] or ['main']), modules()
    why = {}
    for path in paths:
        for test in chosen(path, known): why.setdefault(test, []).append(path)
    print(f'{len(paths)} files changed' + (':' if why else ', none that a test of its own checks'))
    for test, reasons in why.items():
        print(f"  {test.removeprefix('tests/')}  for "
              f"{', '.join(reasons[:3])}{' and others' if len(reasons) > 3 else ''}")
    print(f"  {', '.join(p.removeprefix('tests/') for p in ALWAYS)}  "
          "always\nTests that take long are left to `make test`.", flush=True)
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '2', '--dist', 'load', '-m', 'not slow', *why, *ALWAYS]
    print(shlex.join(['pytest', *command[3:]]), flush=True)
    sys.exit(subprocess.run(command, cwd=REPO).returncode)


if __name__ == '__main__': main()
