"The site is whole, and needs nothing but its own folder."
import json
import re

from conftest import REPO
from mapo.docs import broken
from warm import Warm


def test_site(copy):
    "One build, looked at from all sides: pages, links, mathematics, search."
    code, output = Warm('from mapo.docs import main; main()', said=copy.parent/'said', cwd=copy, PYTHONPATH=copy).wait()
    assert code == 0, output[-4000:]
    site = copy/'_docs'
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    named = {f'{p.parent.name}/{re.sub("^[0-9]+[a-z]?_", "", p.stem)}.html'
             for folder in ('api', 'papers', 'servers', 'tutorials') for p in (REPO/'nbs'/folder).glob('*.ipynb')}
    assert 'index.html' in pages and not named - pages, named - pages
    assert broken(site) == []
    page = (site/'api'/'problems.html').read_text()
    assert page.index('>Tutorials<') < page.index('tutorials/from_one_problem.html') < page.index('>Papers<') < page.rindex('>API<'), 'the sidebar'
    assert 'katex/katex.min.js' in page
    index = json.loads((site/'search.js').read_text().removeprefix('window.searchIndex = '))
    assert {'Problems', 'Agents'} <= {entry['title'] for entry in index}
    assert 'search.js' in (site/'site_libs'/'smalldocs.js').read_text()
