"""Build the docs site in _docs: nbdev turns the notebooks into pages, smalldocs lays them out, and what is left is made
to need no network. It runs no example: pages show the outputs that are stored in the notebooks."""
import os
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from html import unescape
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['IN_TEST'] = '1'  # nbdev's word for: a notebook that calls nbdev_export does nothing now

from build_readme import DOCUMENTS
from latex2mathml.converter import convert as tex_to_mathml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import refresh_quarto_yml
from pages import TOP, make_page
from smalldocs.site import build as smalldocs_build

ROOT = Path(__file__).resolve().parent.parent
NBS, PAGES, SITE = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs'


# 1. Notebooks to pages

def to_pages(text: str) -> str:
    "A text from the top of the project, with links to the pages that documents beside it are made from."
    for document, notebook in DOCUMENTS.items():
        text = text.replace(f']({document}', f']({notebook}')
    return text


def make_pages(n_workers: int):
    shutil.rmtree(PAGES, ignore_errors=True)
    ignore = shutil.ignore_patterns('*.ipynb', '.*', '__pycache__')
    shutil.copytree(NBS, PAGES, ignore=ignore)
    for name in TOP:
        (PAGES/name).write_text(to_pages((ROOT/name).read_text(encoding='utf-8')), encoding='utf-8')
    notebooks = nbglob(NBS, as_path=True).sorted()
    with ProcessPoolExecutor(n_workers, mp_context=get_context('spawn')) as pool:
        for page in pool.map(make_page, notebooks, [PAGES/nb.relative_to(NBS) for nb in notebooks]):
            print(f'  page {page.relative_to(PAGES)}', flush=True)
    return notebooks


# 2. The finishing of each HTML file

def relative_links(html: str, up: str, here: str, anchors: dict[str, set]) -> str:
    "Links to the published site become links inside this one; those to a name that no page documents become text."
    def fix(m):
        page, _, anchor = m['target'].partition('#')
        known = not anchor or anchor in anchors.get(page, ())
        return f'<a href="{up}{m["target"]}"{m["rest"]}' if known else m['text']
    return re.sub(rf'<a href="{re.escape(here)}/(?P<target>[^"]*)"(?P<rest>[^>]*>(?P<text>.*?)</a>)', fix, html)


FORMULA = re.compile(r'<span class="math (?P<kind>inline|display)">\\[(\[](?P<tex>.*?)\\[)\]]</span>', re.S)


def to_mathml(m) -> str:
    display = 'block' if m['kind'] == 'display' else 'inline'
    return tex_to_mathml(unescape(m['tex']).strip(), display=display)


def static_math(html: str) -> str:
    "Formulas as MathML, which browsers draw by themselves, instead of a script from a CDN."
    html = FORMULA.sub(to_mathml, html)
    html = re.sub(r'<link[^>]*katex[^>]*>', '', html)
    return re.sub(r'<script[^>]*katex[^>]*></script>', '', html)


def offer_notebook(html: str, source: Path, up: str) -> str:
    "A link beside the page to the notebook that it was made from."
    if '<div class="toc-actions">' not in html: return html
    link = (f'<div class="action-links"><a class="toc-action" href="{up}notebooks/{source}" download>'
            '<i class="bi bi-journal-arrow-down"></i> Get this notebook</a></div>')
    return html.replace('<div class="toc-actions">', f'<div class="toc-actions">{link}', 1)


def search_from_disk(html: str, up: str) -> str:
    "A page opened from the disk may not fetch the search index, but may load it as a script."
    return html.replace('</head>', f'<script src="{up}site_libs/from_disk.js"></script></head>', 1)


FROM_DISK = """if (location.protocol === "file:") {
  const up = document.querySelector('meta[name="smalldocs:offset"]').content;
  window.fetch = () => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = up + "search.js";
    script.onload = () => resolve({ json: async () => window.searchIndex });
    script.onerror = reject;
    document.head.append(script);
  });
}
"""


def finish(html_file: Path, here: str, sources: dict, anchors: dict[str, set]):
    page = html_file.relative_to(SITE)
    up = '../'*(len(page.parts) - 1)
    html = relative_links(html_file.read_text(encoding='utf-8'), up, here, anchors)
    html = search_from_disk(static_math(html), up)
    for name in TOP:
        html = html.replace(f'/nbs/{name}"', f'/{name}"')  # a link to its source
    if source := sources.get(page):
        html = offer_notebook(html, source, up)
    html_file.write_text(html, encoding='utf-8')


def local_fonts():
    "The themes load fonts from another host: the reader's own fonts will do."
    for css in (SITE/'site_libs/themes').glob('*.css'):
        text = re.sub(r'@import url\(["\']?https?:[^)]*\);?', '', css.read_text(encoding='utf-8'))
        css.write_text(text, encoding='utf-8')


# 3. All of it

def lay_out() -> list[str]:
    "The site without its finishing; what smalldocs warns of."
    site = smalldocs_build(PAGES, quiet=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(site.out, SITE)
    index = (SITE/'search.json').read_text(encoding='utf-8')
    (SITE/'search.js').write_text(f'window.searchIndex = {index}', encoding='utf-8')
    (SITE/'site_libs/from_disk.js').write_text(FROM_DISK)
    return [w for w in site.warnings if 'broken link' not in w]  # check_links.py judges links, in the finished site


def copy_notebooks(notebooks) -> dict[Path, Path]:
    "For each page: the notebook that it was made from, which lies beside it in the site."
    sources = {nb.relative_to(NBS).with_suffix('.html'): nb.relative_to(NBS) for nb in notebooks}
    for source in sources.values():
        (SITE/'notebooks'/source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(NBS/source, SITE/'notebooks'/source)
    return sources


def find_anchors(page: Path) -> set[str]: return set(re.findall(r' id="([^"]+)"', page.read_text(encoding='utf-8')))


def build(n_workers: int = 2) -> int:
    "Build the site; the number of pages, or an exit that names the faults."
    os.chdir(ROOT)
    refresh_quarto_yml()
    notebooks = make_pages(n_workers)
    faults = lay_out()
    sources = copy_notebooks(notebooks)
    local_fonts()
    pages = list(SITE.rglob('*.html'))
    anchors = {p.relative_to(SITE).as_posix(): find_anchors(p) for p in pages}
    here = get_config().doc_host + get_config().doc_baseurl
    for page in pages:
        finish(page, here, sources, anchors)
    if faults:
        sys.exit('the site has faults:\n  ' + '\n  '.join(faults))
    print(f'{len(notebooks)} pages: {SITE.relative_to(ROOT)}/index.html')
    return len(notebooks)


if __name__ == '__main__':
    build()
