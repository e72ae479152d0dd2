"The site is whole, needs nothing but its own folder, and can be read on a screen, on a phone and at night."
import json
import re

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import browser
import docs
from conftest import REPO, copied, once
from warm import Warm

LOOKED_AT = ['index', 'papers/mars_po', 'papers/malt', 'api/tables', 'figures/index', 'tutorials/from_one_problem']
BESIDE = ['CONTRIBUTING.html', 'CHANGELOG.html', 'figures/'] # files that pages lead to, without a place in the sidebar
WIDE = '''(() => {
    document.querySelectorAll('details').forEach(e => e.open = true);
    const box = e => /auto|scroll/.test(getComputedStyle(e).overflowX);
    const scrolls = e => e && e.tagName != 'HTML' && (box(e) || scrolls(e.parentElement));
    const end = document.documentElement.clientWidth + 1;
    const cut = e => e.getBoundingClientRect().right > end && !scrolls(e.parentElement);
    const wide = [...document.querySelectorAll('main *:not(.katex *), header *')].filter(e =>
        (cut(e) || e.matches('pre') && e.scrollWidth > e.clientWidth + 1) && e.checkVisibility());
    return wide.map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`).slice(0, 5);
})()'''
NAMELESS = '''[...document.querySelectorAll('main img, main svg')].filter(e => !e.closest('.katex') &&
    !(e.getAttribute('alt') || e.getAttribute('aria-label') || e.querySelector('title'))).length'''
BUILD = 'import runpy; runpy.run_path("tools/docs.py", run_name="__main__")'
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope='module')
def site():
    "The site, as `make docs` builds it; once, whichever worker asks first."
    def build(folder):
        copy = copied(folder/'mapo-copy')
        code, output = Warm(BUILD, said=folder/'said', cwd=copy, PYTHONPATH=copy).wait()
        assert code == 0, output[-4000:]
    return once('site', build)/'mapo-copy'/'_docs'


@pytest.fixture(scope='module')
def tab(site, tmp_path_factory):
    "A browser; without one these checks are left out."
    if not browser.installed(): pytest.skip('no Chromium is installed')
    with browser.Browser(tmp_path_factory.mktemp('browser')) as tab: yield tab


def notebooks(): return [p for p in (REPO/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]


def test_the_site_is_whole(site):
    "Pages, links, mathematics, search; and every page has its place in the sidebar."
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    named = {p.relative_to(REPO/'nbs').with_name(f'{docs.page_name(p)}.html').as_posix() for p in notebooks()}
    assert named <= pages, named - pages
    assert docs.broken(site) == []
    page = (site/'api'/'problems.html').read_text()
    sections = re.findall(r'class="sidebar-item-text sidebar-link text-start"[^>]*>\s*<span[^>]*>([^<]+)', page)
    assert sections == ['Start', 'Methods', 'Evidence', 'Use it on your own', 'API']
    listed = set(re.findall(r'href="(?:\.\./)*([\w/]+\.html)" class="sidebar-item-text', page)) | {'api/problems.html'}
    listed = {p if '/' in p or p == 'index.html' else f'api/{p}' for p in listed}
    assert named <= listed, f'not in the sidebar of nbs/_quarto.yml: {named - listed}'
    assert 'katex/katex.min.js' in page
    assert 'alt="Results: Accuracy over iterations, a panel per agent."' in (site/'papers'/'mars_po.html').read_text()
    repository = re.search(r'^git_url = (.+)', (REPO/'settings.ini').read_text(), re.M)[1]
    assert re.search(rf'<a[^>]*href="{re.escape(repository)}"', page), 'no link to the repository of settings.ini'
    index = json.loads((site/'search.js').read_text().removeprefix('window.searchIndex = '))
    assert {'Problems', 'Agents'} <= {entry['title'] for entry in index}
    pairs = ' '.join(entry['text'] for entry in index if entry['href'].startswith('api/pairs.html'))
    assert 'def hybrid_pairs(' in pairs, 'signatures'
    assert 'test_fail' not in pairs and 'raise ValueError' not in pairs, 'nothing that is folded'
    assert 'search.js' in (site/'site_libs'/'smalldocs.js').read_text()


def test_what_few_readers_look_for_is_folded(site):
    folded = lambda page: re.findall(r'<summary>([^<]+)</summary>', (site/page).read_text())
    api, paper = folded('api/pairs.html'), folded('papers/mars_po.html')
    assert 'Source of Selection' in api and 'Errors' in api
    assert paper.count('Parameters') == 1 and {'Code', 'The arms'} < {*paper}
    assert sum(title.startswith('all ') for title in paper) >= 3, 'the columns of long tables'
    assert 'Imports' in folded('api/methods.html')
    assert not {'Errors', 'Code', 'Imports'} & {*folded('tutorials/from_one_problem.html')}


@pytest.mark.parametrize('width', [1400, 390])
def test_nothing_is_cut_off_and_nothing_comes_from_elsewhere(site, tab, width):
    for page in LOOKED_AT:
        tab.show(site/f'{page}.html', width)
        assert tab.run('document.documentElement.scrollWidth') <= width and tab.run(WIDE) == [], page
        assert not tab.run(NAMELESS), f'{page}: figures without a text for those who cannot see them'
        assert tab.asked and not [a for a in tab.asked if not a.startswith(('file:', 'data:'))], page


@pytest.mark.parametrize('paper', ['mars_po', 'multiagent_ft', 'malt'])
def test_a_paper_says_its_verdict_first(site, tab, paper):
    "In the first two screens: the figure of the method, the sentences, the main claims with links to their rows."
    tab.show(site/'papers'/f'{paper}.html', 1400)
    assert tab.run("document.querySelector('#verdict').getBoundingClientRect().top") < 1100
    assert tab.run("document.querySelector('#main-claims').getBoundingClientRect().bottom") < 2000
    assert tab.run("document.querySelector('main img').getBoundingClientRect().top") < 700
    links = tab.run("[...document.querySelectorAll('#main-claims a')].map(a => a.getAttribute('href'))")
    rows = tab.run("[...document.querySelectorAll('#claims tbody tr')].map(r => '#' + r.id)")
    assert 3 <= len(links) <= 5 and {*links} <= {*rows}
    seen = """[...document.querySelectorAll('#results th')].filter(th => th.getBoundingClientRect().right <= innerWidth)
              .map(th => th.textContent)"""
    assert tab.run(seen)[:2] == ['arm', 'team'], 'the column that matters is in sight'


def test_dark_mode_changes_the_page(site, tab):
    light, dark = (tab.show(site/'index.html', 1400, dark=dark) or tab.run(BACKGROUND) for dark in (False, True))
    assert light == 'rgb(255, 255, 255)' and max(map(int, re.findall(r'\d+', dark))) < 80, (light, dark)
    tab.show(site/'index.html', 1400)
    tab.run("document.querySelector('.quarto-color-scheme-toggle').click()")
    assert tab.run(f'new Promise(done => setTimeout(() => done({BACKGROUND}), 300))') == dark
    tab.run('localStorage.clear()')


def test_next_and_previous_walk_through_all_pages(site, tab):
    tab.show(site/'index.html', 1400)
    follow = lambda side: tab.run(f"document.querySelector('.nav-page-{side} a')?.href")
    tab.show(after := follow('next'), 1400)
    assert after.endswith('tutorials/from_one_problem.html') and follow('previous').endswith('/index.html')
    ways = {p: re.findall(r'nav-page-(?:previous|next)"><a', p.read_text()) for p in site.rglob('*.html')}
    walked = [p for p in ways if not str(p.relative_to(site)).startswith(tuple(BESIDE))]
    assert sorted(len(ways[p]) for p in walked) == [1, 1] + [2]*(len(walked) - 2)


def test_search_finds_a_function(site, tab):
    tab.show(site/'index.html', 1400)
    found = tab.run('''(async () => {
        const box = document.querySelector('#quarto-search input');
        box.value = 'hybrid_pairs'; box.focus(); box.dispatchEvent(new Event('input'));
        const results = () => [...document.querySelectorAll('.search-result')].map(a => a.getAttribute('href'));
        for (let i = 0; i < 40 && !results().length; i++) await new Promise(done => setTimeout(done, 50));
        return results();
    })()''')
    assert any('api/pairs.html' in link for link in found), found


def test_links_are_changed_and_code_is_not():
    assert docs.relink('See [agents](02_agents.ipynb#Teams) and ![a plot](p.png "Figure 1").', str.upper) == \
        'See [agents](02_AGENTS.IPYNB#TEAMS) and ![a plot](P.PNG "Figure 1").'
    assert docs.relink('[`Model`](a.html), not `[x](a.html)`', str.upper) == '[`Model`](A.HTML), not `[x](a.html)`'
    assert docs.relink('```python\n# see [`Model`](a.html)\n```', str.upper) == '```python\n# see `Model`\n```'


@pytest.mark.parametrize('link,target', {
    'https://host/api/agents.html#team': '/api/agents.html#team',
    'https://host/api/runs.html#run.stage': '/api/runs.html#run',
    '02_agents.ipynb#Teams': '/api/agents.ipynb#Teams',
    '../../figures/mars_po.png': '/figures/mars_po.png',
    '#Teams': '#Teams',
    'https://arxiv.org/abs/2411.19039': 'https://arxiv.org/abs/2411.19039'}.items())
def test_a_link_of_a_notebook_leads_to_the_site(link, target):
    assert docs.site_link(link, 'nbs/api', 'https://host') == target


def test_readme_shows_outputs_and_leads_to_files_of_the_repository(tmp_path):
    (tmp_path/'nbs').mkdir()
    table = '| agent | right |\n|---|---|\n| a | .5 |'
    shown = new_output('display_data', data={'text/markdown': table})
    cells = [new_markdown_cell('# mapo\nRead [agents](api/02_agents.ipynb).'), new_code_cell('#| hide\nimport os'),
             new_code_cell('#| echo: false\ntable()', outputs=[shown])]
    write(new_notebook(cells=cells), tmp_path/'nbs'/'index.ipynb')
    read = docs.readme(tmp_path/'nbs'/'index.ipynb')
    assert read == f'# mapo\nRead [agents](nbs/api/02_agents.ipynb).\n\n{table}\n'


def test_a_figure_is_described_by_what_draws_it_or_by_the_prose(monkeypatch):
    own = 'A panel per agent.'
    monkeypatch.setattr(docs, 'plots', lambda: {'plot_agents': own})
    prose, call, other = '## Results\n\nWhat **each** arm\nreached:', 'draw = plot_agents\ndraw(rows)', 'draw(rows)'
    cells = [new_markdown_cell(prose), new_code_cell(call), new_code_cell(other),
             new_markdown_cell('## Cost'), new_code_cell(other)]
    described = [docs.alternative(cells, place) for place in (1, 2, 4)]
    assert described == [f'Results: {own}', 'Results: What each arm reached:', f'Cost: {own}']


def test_a_file_that_a_page_leads_to_comes_with_what_it_leads_to(tmp_path):
    notes = 'See ![one](b/one.png), [two](../nbs/api/02_agents.ipynb), [x](https://x.org), [h](#h).'
    for file, text in {'a/NOTES.md': notes, 'a/b/one.png': 'one', 'c/README.md': '[notes](../a/NOTES.md)'}.items():
        (tmp_path/'repo'/file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'repo'/file).write_text(text)
    project = tmp_path/'project'
    assert docs.brought('/c/README.md#x', tmp_path/'repo', project) == '/c/index.md#x'
    assert (project/'c'/'index.md').read_text() == '[notes](/a/NOTES.md)'
    assert (project/'a'/'b'/'one.png').read_text() == 'one'
    said = 'See ![one](/a/b/one.png), [two](/api/agents.ipynb), [x](https://x.org), [h](#h).'
    assert (project/'a'/'NOTES.md').read_text() == said


def test_a_page_that_lacks_something_is_named(tmp_path):
    (tmp_path/'api').mkdir()
    (tmp_path/'api'/'pairs.html').write_text('<h2 id="teams">Teams</h2>')
    links = ''.join(f'<a href="api/pairs.html#{name}">pairs</a>' for name in ('hybrid', 'teams'))
    (tmp_path/'index.html').write_text(f'{links} <img src="https://host/logo.png">')
    problems = ['index.html loads https://host/logo.png',
                'index.html links to api/pairs.html#hybrid, which is not there']
    assert docs.broken(tmp_path) == problems


@pytest.mark.parametrize('source,parts', {
    'test_eq(f(1), 2)\ntest_fail(lambda: f(0),\n contains="a")\nf(3)':
        ('test_eq(f(1), 2)\nf(3)', 'test_fail(lambda: f(0),\n contains="a")'),
    'bad = g()\ntest_fail(lambda: f(bad))': ('', 'bad = g()\ntest_fail(lambda: f(bad))'),
    'used = g()\ntest_fail(lambda: f(used))': ('used = g()', 'test_fail(lambda: f(used))'),
    'with ExceptionExpected(regex="no"): f(0)': ('', 'with ExceptionExpected(regex="no"): f(0)'),
    'for x in bad: test_fail(lambda: f(x))\nf(1)': ('f(1)', 'for x in bad: test_fail(lambda: f(x))'),
    '%%time\nf(1)': ('%%time\nf(1)', '')}.items())
def test_what_a_cell_shows_is_told_from_the_errors_that_it_shows(source, parts):
    assert docs.apart(source, 'f(used)') == parts
