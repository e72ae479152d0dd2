"""README.md and the site, from the committed notebooks and their saved outputs, without a network: `make docs`.

nbdev prepares the notebooks, smalldocs lays the pages out. What is changed on the way: signatures are read from the
modules, so that no notebook is run; source, errors and the code of paper pages are folded; figures get a text for those
who cannot see them; links lead to files of the site; nothing is loaded from elsewhere.
"""
import ast
import json
import posixpath
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from urllib.parse import unquote, urlsplit
from warnings import catch_warnings, simplefilter

LINK = re.compile(r'(?P<code>```.*?```|`[^`\n]+`)|(?<=\]\()[^)\s]+(?=[)\s])', re.S)
NAME = re.compile(r'\[(`[^`]+`)\]\([^)]+\)')

# README.md


def relink(
    text:str, # Markdown
    change, # called with each link's target; returns the new one
)->str: # the same text with the targets changed
    "Rewrite the target of every Markdown link and image in `text`; code, and a name in backticks in it, stay."
    return LINK.sub(lambda m: NAME.sub(r'\1', m[0]) if m['code'] else change(m[0]), text)


def moved(
    link:str, # a link as the notebook has it
    folder:str, # the notebook's folder, relative to the repository: `nbs` or `nbs/api`
)->str: # the same link, relative to the repository; links to elsewhere and to headings stay
    "Follow a notebook's relative link from the root of the repository."
    elsewhere = urlsplit(link).scheme or link.startswith(('#', '/'))
    return link if elsewhere else posixpath.normpath(posixpath.join(folder, link))


def readers_view(
    nb, # a notebook, which is changed
):
    "Drop hidden cells and every directive, and mark the cells that show only their outputs."
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| *hide', c.source, re.M)]
    for cell in (c for c in nb.cells if c.cell_type == 'code'):
        if re.search(r'^#\| *echo: *false', cell.source, re.M): cell.metadata['tags'] = ['silent']
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return nb


def readme(
    notebook:Path, # `nbs/index.ipynb`, executed
)->str: # Markdown for README.md, its links relative to the repository
    "Write the index notebook, with its saved outputs, as Markdown."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    silent = Config(TagRemovePreprocessor={'enabled': True, 'remove_input_tags': {'silent'}})
    nb = readers_view(nbformat.read(notebook, as_version=4))
    nb.metadata['language_info'] = dict(name='python') # nbdev_clean takes it away; code is coloured by it
    text, _ = MarkdownExporter(config=silent).from_notebook_node(nb)
    return re.sub(r'\n{3,}', '\n\n', relink(text, lambda link: moved(link, notebook.parent.name))).strip() + '\n'


# A notebook's cells, as a reader wants them


def signature(
    symbol, # a class or function
    name:str, # as the page calls it
)->str: # Markdown
    "A heading, the signature with the comments of its parameters or fields, and the docstring."
    from fastcore.docments import MarkdownRenderer
    with catch_warnings(): # of docstrings that other libraries' classes hand down
        simplefilter('ignore')
        return f'### {name}\n\n{MarkdownRenderer(symbol, name=name)._repr_markdown_()}'


def set_option(
    cell, # a code cell, which is changed
    **options, # Quarto's, with `_` for `-`
):
    "Give a cell options that it does not set itself."
    for key, value in options.items():
        key = key.replace('_', '-')
        own = re.search(rf'^#\| *{key}:', cell.source, re.M)
        if not own: cell.source = f'#| {key}: {json.dumps(value)}\n{cell.source}'


def defined(
    source:str, # Python
)->list: # names
    "The functions, classes and constants that a cell defines."
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def refuses(
    node, # a statement
)->bool:
    "Whether a statement does nothing but show that something is refused."
    if isinstance(node, ast.Expr): return getattr(getattr(node.value, 'func', None), 'id', '') == 'test_fail'
    expected = isinstance(node, ast.With) and 'ExceptionExpected' in ''.join(map(ast.unparse, node.items))
    return expected or isinstance(node, (ast.With, ast.For)) and all(map(refuses, node.body))


def apart(
    source:str, # of a cell
    later:str, # of the cells below it
)->tuple: # what it shows, and what it shows to be refused: source, either may be ''
    "Take the statements apart that only show errors, and with them what nothing else needs."
    body = ast.parse(source).body if re.search(r'\b(test_fail|ExceptionExpected)\(', source) else []
    errors, others = ([n for n in body if refuses(n) == wanted] for wanted in (True, False))
    if not errors: return source, ''
    helpers = all(isinstance(n, (ast.Assign, ast.FunctionDef, ast.Import, ast.ImportFrom)) for n in others)
    if helpers and not any(re.search(rf'\b{name}\b', later) for name in defined(source)): return '', source
    taken = {line for n in errors for line in range(n.lineno - 1, n.end_lineno)}
    lines = [*enumerate(source.splitlines(keepends=True))]
    return tuple(''.join(l for i, l in lines if (i in taken) == wanted).strip() for wanted in (False, True))


def fold(
    cell, # a code cell without nbdev's directives, which is changed
    folder:str, # of its page: on the pages of `papers` results matter, and not the code that shows them
):
    "Fold away what few readers of a page look for."
    imports = re.fullmatch(r'((from|import) .*\n?|\s*\n)+', cell.source)
    if 'parameters' in cell.metadata.get('tags', []): set_option(cell, code_fold=True, code_summary='Parameters')
    elif folder == 'papers': set_option(cell, code_fold=True, code_summary='Code')
    elif folder == 'api' and imports: set_option(cell, code_fold=True, code_summary='Imports')


def fold_source(
    cell, # an exported cell, which is changed
):
    "Fold the source of what is exported, under the names that it defines; imports are dropped."
    names = [*dict.fromkeys(defined(cell.source))]
    title = f'Source of {", ".join(names[:3])}{", …" if len(names) > 3 else ""}'
    if names: set_option(cell, code_fold=True, code_summary=title)
    else: del cell['source']


@cache
def plots()->dict: # name -> what it draws
    "The first sentence of the docstring of each function of mapo that draws a figure."
    from mapo._modidx import d
    found = [(m, s.rpartition('.')[2]) for m, symbols in d['syms'].items() for s in symbols if '.plot_' in s]
    return {name: getattr(import_module(module), name).__doc__.partition('\n')[0] for module, name in found}


def drawn(
    source:str, # of a cell
)->str: # '' where no function of mapo is called that draws
    "What a cell draws, in the words of the function that it calls last."
    return next((plots()[name] for name in reversed(re.findall(r'\bplot_\w+', source)) if name in plots()), '')


def alternative(
    cells:list, # of a notebook
    place:int, # of the cell with the figure
)->str: # one or two sentences
    "Say in words what a figure shows: its section, and what was called, else the prose before, else an earlier call."
    code, text = ([c.source for c in cells[:place] if c.cell_type == kind] for kind in ('code', 'markdown'))
    headings = re.findall(r'^#+ +(.+)', '\n'.join(text), re.M)
    paragraph = re.sub(r'^#.*|[*`$]', '', text[-1] if text else '', flags=re.M).strip().rpartition('\n\n')[2]
    earlier = next(filter(None, map(drawn, reversed(code))), 'a figure')
    return ': '.join(headings[-1:] + [drawn(cells[place].source) or ' '.join(paragraph.split()) or earlier])


def page_processors():
    "nbdev's processors for a page, with what this module does in the place of running the notebook."
    from execnb.nbio import mk_cell
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults

    class Document(Processor):
        "Put signatures in the place of nbdev's calls of `show_doc`, before the source, and fold what is to be folded."
        def begin(self):
            exported = [c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in (c.directives_ or {})]
            self.module = exported[0][0] if exported else None
            self.folder = Path(self.nb.path_).parent.name
            cells = self.ordered(self.nb.cells)
            self.nb.cells = [p for place, cell in enumerate(cells) for p in self.parts(cell, cells[place+1:])]
            for place, cell in enumerate(self.nb.cells): self.describe(place, cell)

        def ordered(self, cells):
            "An exported cell comes after the documentation of what it defines."
            order, held = [], []
            for cell in cells:
                if not getattr(cell, 'has_sd', False): order, held = order+held, []
                if 'export' in (cell.directives_ or {}): held = [cell]
                else: order.append(cell)
            return order+held

        def parts(self, cell, below):
            "Errors that a cell shows become a folded cell after it."
            if cell.cell_type != 'code' or cell.directives_ or getattr(cell, 'has_sd', False): return [cell]
            shown, errors = apart(cell.source, '\n'.join(c.source for c in below if c.cell_type == 'code'))
            if not errors: return [cell]
            folded = mk_cell(errors)
            set_option(folded, code_fold=True, code_summary='Errors')
            cell.source = shown
            return [cell, folded] if shown else [folded]

        def describe(self, place, cell):
            "Give a cell's figure its text."
            figure = any(kind.startswith('image/') for o in cell.get('outputs', []) for kind in o.get('data', {}))
            if figure: set_option(cell, fig_alt=alternative(self.nb.cells, place))

        def cell(self, cell):
            directives = cell.directives_ or {}
            if getattr(cell, 'has_sd', False): self.show(cell)
            elif directives.keys() & {'hide', 'default_exp', 'exporti'}: del cell['source']
            elif 'export' in directives: fold_source(cell)
            elif cell.cell_type == 'code': fold(cell, self.folder)

        def show(self, cell):
            name = re.fullmatch(r'show_doc\((.+)\)', cell.source)[1]
            cell.cell_type = 'markdown'
            cell.source = signature(attrgetter(name)(import_module(f'mapo.{self.module}')), name)

    instead = {'exec_show_docs': Document}
    without = ['insert_warning', 'clean_show_doc', 'rm_export', 'add_fold', 'mv_exports']
    return [instead.get(p.__name__, p) for p in FilterDefaults().base_procs() if p.__name__ not in without]


# The processed project


def page_name(
    path:Path, # of a notebook
)->str: # its page's, without the number that orders it
    "`02_agents` is the page `agents`."
    return re.sub(r'^\d+_', '', path.stem)


def site_link(
    link:str, # a link in a notebook
    folder:str, # the notebook's folder, relative to the repository: `nbs` or `nbs/api`
    host:str, # where nbdev thinks the site will be
)->str: # a path from the root of the site, or the link as it was
    "Map a link to a path from the site's root."
    if link.startswith(host): return '/' + re.sub(r'(#[^.]+)[.].*', r'\1', link.removeprefix(host).lstrip('/'))
    path, hash, fragment = moved(link, folder).partition('#')
    if urlsplit(link).scheme or not path: return link
    if path.endswith('.ipynb'): path = posixpath.join(posixpath.dirname(path), f'{page_name(Path(path))}.ipynb')
    return '/' + path.lstrip('/').removeprefix('nbs/') + hash + fragment


def brought(
    link:str, # a path from the root of the site, or a link to elsewhere
    root:Path, # the repository
    project:Path, # the processed project
)->str: # the link; a README, which is no page of a site, is its folder's index there
    "Copy the file of the repository that a link leads to, and what that leads to, where the project does not have it."
    path, hash, fragment = link.partition('#')
    file = path.lstrip('/')
    if not link.startswith('/') or not (root/file).is_file(): return link
    there = re.sub(r'README\.md$', 'index.md', file)
    if not (project/there).exists():
        (project/there).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/file, project/there)
        if file.endswith('.md'): bring_links(file, project/there, root, project)
    return f'/{there}{hash}{fragment}'


def bring_links(
    file:str, # a Markdown file of the repository
    copy:Path, # the project's, which is changed
    root:Path, # the repository
    project:Path, # the processed project
):
    "Bring what a Markdown file leads to; a link to a notebook leads to its page."
    def change(link):
        path = moved(link, posixpath.dirname(file))
        if path == link and (urlsplit(link).scheme or link.startswith(('#', '/'))): return link
        return brought(site_link(path, '', '//'), root, project)
    copy.write_text(relink(copy.read_text(), change))


def prose(
    notebook, # processed
): # yields (dictionary, key) of each Markdown text
    "Find the Markdown of a notebook: its cells and its outputs."
    for cell in notebook['cells']:
        if cell['cell_type'] == 'markdown': yield cell, 'source'
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}): yield output['data'], 'text/markdown'


def process(
    root:Path, # the repository
)->Path: # the project, ready to be rendered
    "Write the processed project to `_proc`: pages of notebooks, and beside them what the pages need."
    from execnb.nbio import read_nb, write_nb
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.process import NBProcessor
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()
    _build_modidx()
    project, notebooks, host = root/'_proc', root/'nbs', get_config().doc_host
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(notebooks, project, ignore=shutil.ignore_patterns('*.ipynb', '*.py', '.*', '__pycache__'))
    paths = [p for p in sorted(notebooks.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    pages = {p: project/p.relative_to(notebooks).with_name(f'{page_name(p)}.ipynb') for p in paths}
    for page in pages.values(): page.touch() # so that no link to one brings the notebook
    for order, (path, page) in enumerate(pages.items()):
        NBProcessor(nb=(nb := read_nb(path)), procs=page_processors()).process()
        nb.cells[0].source = nb.cells[0].source.replace('output-file:', f'order: {order}\noutput-file:')
        folder = path.parent.relative_to(root).as_posix()
        def change(link): return brought(site_link(link, folder, host), root, project)
        for holder, key in prose(nb): holder[key] = relink(''.join(holder[key]), change)
        write_nb(nb, page)
    return project


# The site

FETCH = '''const r = await fetch(offset + "search.json");
      index = await r.json();'''
LOAD = '''await new Promise((done, fail) => {
        const script = Object.assign(document.createElement("script"),
                                     {src: offset + "search.js", onload: done, onerror: fail});
        document.head.append(script);
      });
      index = window.searchIndex;'''
ACTIVE = '''
const sidebar = document.querySelector("#quarto-sidebar"), active = sidebar?.querySelector(".sidebar-link.active");
if (active) sidebar.scrollTop = active.offsetTop - sidebar.clientHeight / 2; // the page's own entry, in a long sidebar
'''


def localize(
    site:Path, # a rendered site
    cdn:str, # the address smalldocs loads KaTeX from
):
    "Let a site load nothing that is not in its own folder, and search without a server."
    for page in site.rglob('*.html'):
        here = '../' * (len(page.relative_to(site).parts) - 1) + 'katex/'
        text = page.read_text()
        page.write_text(text.replace(f'{cdn}/contrib/', here).replace(f'{cdn}/', here))
    for style in (site/'site_libs'/'themes').rglob('*.css'): # fonts of a foundry's server
        style.write_text(re.sub(r'@import url\(https?:[^)]*\);', '', style.read_text()))
    script = site/'site_libs'/'smalldocs.js'
    script.write_text(script.read_text().replace(FETCH, LOAD))
    with script.open('a') as more: more.write(ACTIVE)
    (site/'search.js').write_text('window.searchIndex = ' + (site/'search.json').read_text())


def folded_code(
    page:Path, # a processed page
)->list: # source, with single spaces
    "What is folded on a page."
    cells = json.loads(page.read_text())['cells'] if page.suffix == '.ipynb' else []
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    folded = [re.sub(r'^#\|.*\n', '', c, flags=re.M) for c in code if re.search(r'^#\| code-fold: true', c, re.M)]
    return sorted((' '.join(c.split()) for c in folded), key=len, reverse=True)


def search_prose(
    site, # of smalldocs, rendered
):
    "Write the search index again without what is folded, which would crowd out the rest."
    for page in site.pages.values():
        code = folded_code(site.root/page.src)
        for part in page.env.get('search', []):
            for source in code: part['text'] = part['text'].replace(source, '')
    site.write_search()


class Page(HTMLParser):
    "The links, loaded files and ids of one page."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or '' for k, v in attrs}
        self.ids |= {attrs[k] for k in ('id', 'name') if k in attrs}
        if tag == 'a' and 'href' in attrs: self.links.append(attrs['href'])
        if tag == 'link' and attrs.get('rel') != 'canonical': self.loads.append(attrs.get('href', ''))
        if 'src' in attrs: self.loads.append(attrs['src'])


def broken(
    site:Path, # a rendered site
)->list: # one sentence for each link that leads nowhere and each thing loaded from elsewhere
    "Find the links of a site that do not work, and what it does not have itself."
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob('*.html')}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        remote = [u for u in page.loads if urlsplit(u).scheme in ('http', 'https') or u.startswith('//')]
        problems += [f'{name} loads {url}' for url in remote]
        local = [u for u in page.links + page.loads if u and not urlsplit(u).scheme and not u.startswith('//')]
        problems += [f'{name} links to {u}, which is not there' for u in local if not leads(path, u, pages)]
    return problems


def leads(
    path:Path, # the page, resolved
    link:str, # a relative link on it
    pages:dict, # resolved path -> `Page`
)->bool: # whether the file is there, with the heading that the link names
    "Follow a link within a site."
    file, fragment = unquote(urlsplit(link).path), unquote(urlsplit(link).fragment)
    target = (path.parent/file).resolve() if file else path
    if target.is_dir(): target = target/'index.html'
    return target.exists() and (not fragment or target not in pages or fragment in pages[target].ids)


def build(
    root:Path, # the repository
)->Path: # the site's folder, `_docs`
    "Build the site from the committed notebooks."
    from smalldocs import highlight
    from smalldocs.layout import KATEX
    from smalldocs.site import build as render
    highlight.css_class = cache(highlight.css_class) # the same few tokens, a quarter of a million times
    made, site = render(process(root), quiet=True), root/'_docs'
    search_prose(made)
    localize(rendered := made.out, KATEX)
    if problems := broken(rendered):
        raise SystemExit('the site has links that do not work; mend them in the notebooks:\n  ' + '\n  '.join(problems))
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(rendered, site)
    return site


def main():
    "Write README.md and build the site in `_docs`."
    from nbdev.config import get_config
    root = Path(get_config().config_path)
    (root/'README.md').write_text(readme(root/'nbs'/'index.ipynb'))
    site = build(root)
    print(f'{len(list(site.rglob("*.html")))} pages; open {site/"index.html"}')


if __name__ == '__main__': main()
