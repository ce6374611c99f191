"""Build the docs site in _docs: nbdev turns the notebooks into pages, smalldocs lays them out, and what is left is made
to need no network. It runs no example: pages show the outputs that are stored in the notebooks."""
import json
import os
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from html import unescape
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['IN_TEST'] = '1'  # nbdev's word for: a notebook that calls nbdev_export does nothing now

from execnb.nbio import mk_cell, read_nb, write_nb
from latex2mathml.converter import convert as tex_to_mathml
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_fold, exec_show_docs, mv_exports
from nbdev.quarto import refresh_quarto_yml
from smalldocs.site import build as smalldocs_build

ROOT = Path(__file__).resolve().parent.parent
NBS, PAGES, SITE = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs'
TOP = 'CONTRIBUTING.md', 'CHANGELOG.md'
output_file = re.compile(r'^output-file: (\S+)\.html\n', re.M)


# 1. Notebooks to pages

def split_title(nb):
    "nbdev takes the title and the summary out of the first cell and drops the rest of it: move the rest to a cell of its own."
    first = nb.cells[0]
    m = re.match(r'\s*(#\s[^\n]*\n+(?:>[^\n]*\n*)?)(.*)', first.source + '\n', re.S)
    if first.cell_type != 'markdown' or not m or not m[2].strip(): return
    first.source = m[1].strip()
    nb.cells.insert(1, mk_cell(m[2].strip(), 'markdown'))
    for i, cell in enumerate(nb.cells): cell.idx_ = i


markdown_link = re.compile(r'(\[[^\]]*\]\([^)]*\))')
link_names = NbdevLookup.link_line


def link_unlinked(self, line: str) -> str:
    "Link the names in a line to their pages, as nbdev does, but leave alone those that are in a link already."
    return ''.join(part if i % 2 else link_names(self, part) for i, part in enumerate(markdown_link.split(line)))


NbdevLookup.link_line = link_unlinked


class document_module(exec_show_docs):
    "Signatures and parameter comments of what a notebook exports, from the module. nbdev would run every cell that imports something."
    def begin(self):
        super().begin()
        module = re.search(r'^#\|\s*default_exp\s+(\S+?)(\.__init__)?$', '\n'.join(c.source for c in self.nb.cells), re.M)
        if module: self.run(f'from {get_config().lib_path.name}.{module[1]} import *')

    def __call__(self, cell):
        if cell.cell_type != 'code' or not re.search(r'^show_doc\(', cell.source, re.M): return
        cell.outputs = self.run(cell.source)
        for data in (o['data'] for o in cell.outputs if 'text/markdown' in o.get('data', {})):
            data['text/markdown'] = NbdevLookup().linkify(''.join(data['text/markdown']))

    def run(self, code: str):
        outputs = self.k.run(code)
        if self.k.exc: raise RuntimeError(f'{self.nb.path_}: {code}') from self.k.exc
        return outputs


def show_source(nb):
    "Definitions are part of the page, folded under their signatures. nbdev shows them only where a cell says `exports`."
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(r'^(class|def|async def|@)', cell.source, re.M):
            cell.source = re.sub(r'^#\s*\|\s*export$', '#| exports', cell.source, flags=re.M)


def fold_source(cell):
    if cell.cell_type != 'code' or 'exports' not in cell.directives_: return
    names = re.findall(r'^(?:async def|def|class) (\w+)', cell.source, re.M)
    cell.source = f'#| code-fold: true\n#| code-summary: "Definition of {", ".join(names)}"\n{cell.source}'


class place_source(Processor):
    "Signatures in the order of the definitions, and the definitions after them."
    def begin(self):
        cells = self.nb.cells
        for i, cell in enumerate(cells):
            if cell.cell_type != 'code' or 'exports' not in cell.directives_: continue
            n = next((n for n, c in enumerate(cells[i + 1:]) if not hasattr(c, 'has_sd')), len(cells) - i - 1)
            cells[i:i + n + 1] = [*reversed(cells[i + 1:i + n + 1]), cell]
            cell.directives_.pop('exports')  # seen




def link_to_top(nb):
    "CONTRIBUTING and CHANGELOG lie above nbs/, and at the top of the site."
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = re.sub(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(TOP)}))\)", r'](\1)', cell.source)


class PageProcs(FilterDefaults):
    def base_procs(self):
        ours = {exec_show_docs: document_module, add_fold: fold_source, mv_exports: place_source}
        return [ours.get(p, p) for p in super().base_procs()]


def make_page(source: Path) -> Path:
    "One notebook as a page: signatures and parameter tables of what it exports, names linked to their pages."
    nb = read_nb(source)
    for prepare in (split_title, link_to_top, show_source): prepare(nb)
    PageProcs()(nb)
    page = PAGES/source.relative_to(NBS)
    if m := output_file.search(nb.cells[0].source):  # nbdev asks Quarto to rename the page: do that here, so that links to it hold
        nb.cells[0].source = output_file.sub('', nb.cells[0].source)
        page = page.with_stem(m[1])
    page.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, page)
    return page


def make_pages(n_workers: int):
    shutil.rmtree(PAGES, ignore_errors=True)
    ignore = shutil.ignore_patterns('*.ipynb', '.*', '__pycache__')
    shutil.copytree(NBS, PAGES, ignore=ignore)
    for name in TOP: shutil.copy2(ROOT/name, PAGES/name)
    notebooks = nbglob(NBS, as_path=True).sorted()
    # A process each, because the shell that runs show_doc takes over the process's __main__.
    with ProcessPoolExecutor(n_workers, mp_context=get_context('spawn'), max_tasks_per_child=1) as pool:
        for page in pool.map(make_page, notebooks): print(f'  page {page.relative_to(PAGES)}')
    return notebooks


# 2. The finishing of each HTML file

def relative_links(html: str, up: str, here: str) -> str:
    "Links that nbdev wrote to the published site become links inside this one, wherever it is read."
    return html.replace(f'href="{here}/', f'href="{up}')


def to_mathml(m) -> str:
    display = 'block' if m['kind'] == 'display' else 'inline'
    return tex_to_mathml(unescape(m['tex']).strip(), display=display)


def static_math(html: str) -> str:
    "Formulas as MathML, which browsers draw by themselves, instead of a script from a CDN."
    html = re.sub(r'<span class="math (?P<kind>inline|display)">\\[(\[](?P<tex>.*?)\\[)\]]</span>', to_mathml, html, flags=re.S)
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


def finish(html_file: Path, here: str, sources: dict):
    page = html_file.relative_to(SITE)
    up = '../'*(len(page.parts) - 1)
    html = relative_links(html_file.read_text(encoding='utf-8'), up, here)
    html = search_from_disk(static_math(html), up)
    if source := sources.get(page): html = offer_notebook(html, source, up)
    html_file.write_text(html, encoding='utf-8')


def local_fonts():
    "The themes load fonts from another host: the reader's own fonts will do."
    for css in (SITE/'site_libs/themes').glob('*.css'):
        css.write_text(re.sub(r'@import url\(["\']?https?:[^)]*\);?', '', css.read_text(encoding='utf-8')), encoding='utf-8')


# 3. All of it

def build(n_workers: int = 2) -> int:
    "Build the site; the number of pages, or an exit that names the faults."
    os.chdir(ROOT)
    cfg = get_config()
    refresh_quarto_yml()
    notebooks = make_pages(n_workers)
    site = smalldocs_build(PAGES, quiet=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(site.out, SITE)
    (SITE/'search.js').write_text('window.searchIndex = ' + (SITE/'search.json').read_text(encoding='utf-8'), encoding='utf-8')
    (SITE/'site_libs/from_disk.js').write_text(FROM_DISK)
    sources = {nb.relative_to(NBS).with_suffix('.html'): nb.relative_to(NBS) for nb in notebooks}
    for source in sources.values():
        (SITE/'notebooks'/source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(NBS/source, SITE/'notebooks'/source)
    local_fonts()
    here = cfg.doc_host + cfg.doc_baseurl
    for html_file in SITE.rglob('*.html'): finish(html_file, here, sources)
    faults = [w for w in site.warnings if 'broken link' not in w]  # links are judged in the finished site, by check_links.py
    if faults: sys.exit('the site has faults:\n  ' + '\n  '.join(faults))
    print(f'{len(notebooks)} pages: {SITE.relative_to(ROOT)}/index.html')
    return len(notebooks)


if __name__ == '__main__': build()
