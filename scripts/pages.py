"One notebook as a page of the site: what scripts/build_docs.py does to each, on top of what nbdev does."
import ast
import html
import inspect
import re
from operator import attrgetter
from pathlib import Path
from types import GenericAlias, SimpleNamespace

import click
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _lineno
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_fold, exec_show_docs, mv_exports

TOP = 'CONTRIBUTING.md', 'CHANGELOG.md'  # texts that lie above nbs/, and at the top of the site
output_file = re.compile(r'^output-file: (\S+)\.html\n', re.M)
NO_DOCSTRING = re.compile(r'^\*Call self as a function\.\*$', re.M)  # what fastcore finds instead
MODEL = re.compile(r'^def (\w+)\(\s*\*\*data:\s*Any\s*\)\s*->\s*None:', re.M)
PROGRESS = re.compile(r'[^\n\r]*\d%\|[^\n\r]*?/s(?:, [^\]\n]*)?\]\s?')
SHOWN = re.compile(r'^show_doc\((\w[\w.]*)', re.M)
ALL_NAMES = "globals().update({k: v for k, v in vars(module).items() if not k.startswith('__')})"
markdown_link = re.compile(r'(\[[^\]]*\]\([^)]*\))')


def split_title(nb):
    "nbdev keeps the title and the summary of the first cell and drops the rest of it: give the rest a cell of its own."
    first = nb.cells[0]
    m = re.match(r'\s*(#\s[^\n]*\n+(?:>[^\n]*\n*)?)(.*)', first.source + '\n', re.S)
    if first.cell_type != 'markdown' or not m or not m[2].strip(): return
    first.source = m[1].strip()
    nb.cells.insert(1, mk_cell(m[2].strip(), 'markdown'))
    for i, cell in enumerate(nb.cells):
        cell.idx_ = i


link_names = NbdevLookup.link_line


def link_unlinked(self, line: str) -> str:
    "Link the names in a line to their pages, as nbdev does, but leave alone those that are in a link already."
    return ''.join(part if i % 2 else link_names(self, part) for i, part in enumerate(markdown_link.split(line)))


NbdevLookup.link_line = link_unlinked


def link_source(self, name: str) -> str | None:
    "Link to a definition's line, which nbdev knows by the name without its module."
    if not isinstance(found := self[name], tuple): return None
    _, path, file = found
    line = _lineno(name.removeprefix(path.removesuffix('.py').removesuffix('/__init__').replace('/', '.') + '.'), path)
    return f'{file}#L{line}' if line else file


NbdevLookup.code = link_source


def with_full_types(
    text: str, # A signature in Markdown, as nbdev writes it: `names:list`
    thing: object,
) -> str: # `names:list[str]`; what a class gives is not said
    "Names of types with what they hold."
    if isinstance(thing, type):
        text = text.replace(')->None:', '):', 1)
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return text
    found = [(f'{n}:', p.annotation) for n, p in signature.parameters.items()]
    for before, kind in [*found, (')->', signature.return_annotation)]:
        if not isinstance(kind, GenericAlias): continue
        full = re.sub(r'(?:\w+\.)+(?=\w)', '', inspect.formatannotation(kind))
        short = rf'(?<!\w){re.escape(before)}{kind.__name__}(?!\w|\[)'
        text = re.sub(short, lambda _, new=before + full: new, text, count=1)
    return text


def command_words(group: click.Command | None, command: click.Command) -> str:
    "What one types to start a command; of one outside of the group, its name."
    def find(found, words):
        if found is command: return words
        return next(filter(None, (find(c, f'{words} {n}') for n, c in getattr(found, 'commands', {}).items())), '')
    return find(group, 'transformer-experiments') if group else str(command.name)


class document_module(exec_show_docs):
    """Signatures and parameter comments of what a notebook exports, from the module.

    nbdev would run every cell that imports something."""
    def begin(self):
        super().begin()
        source = '\n'.join(c.source for c in self.nb.cells)
        module = re.search(r'^#\|\s*default_exp\s+(\S+?)(\.__init__)?$', source, re.M)
        if module: # all its names: a class from elsewhere may have been given a method here
            self.run(f'import {get_config().lib_path.name}.{module[1]} as module\n{ALL_NAMES}')

    def __call__(self, cell):
        if cell.cell_type != 'code' or not (shown := SHOWN.search(cell.source)): return
        cell.outputs = self.run(cell.source)
        name = shown[1]
        thing = attrgetter(name)(SimpleNamespace(**self.k.user_ns))
        for data in (o['data'] for o in cell.outputs if 'text/markdown' in o.get('data', {})):
            text = NO_DOCSTRING.sub('', ''.join(data['text/markdown']))
            text = self.show_command(thing, name) if isinstance(thing, click.Command) else with_full_types(text, thing)
            data['text/markdown'] = NbdevLookup().linkify(MODEL.sub(self.show_fields, text))

    def show_command(self, command: click.Command, name: str) -> str: # What --help prints
        words = command_words(self.k.user_ns.get('main'), command)
        context = click.Context(command, info_name=words, terminal_width=100, show_default=True)
        shown = command.get_help(context)
        return f'---\n\n### {words} {{#{name}}}\n\n```text\n{shown}\n```'

    def show_fields(self, found: re.Match) -> str: # The signature of pydantic's classes says only `**data`
        kinds = [k for k in reversed(self.k.user_ns[found[1]].__mro__) if hasattr(k, 'model_fields')][1:]
        fields = [line for k in kinds for line in inspect.getsource(k).splitlines() if re.match(r'    \w+: ', line)]
        return '\n'.join([f'def {found[1]}(', *fields, ')'])

    def run(self, code: str):
        outputs = self.k.run(code)
        if self.k.exc: raise RuntimeError(f'{self.nb.path_}: {code}') from self.k.exc
        return outputs


def show_source(nb):
    "Definitions are part of the page, folded under their signatures. nbdev shows them where a cell says `exports`."
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(r'^(class|def|async def|@)', cell.source, re.M):
            cell.source = re.sub(r'^#\s*\|\s*export$', '#| exports', cell.source, flags=re.M)


def fold_source(cell):
    if cell.cell_type != 'code' or 'exports' not in cell.directives_: return
    names = re.findall(r'^(?:async def|def|class) (\w+)', cell.source, re.M)
    cell.source = f'#| code-fold: true\n#| code-summary: "Definition of {", ".join(names)}"\n{cell.source}'


CHECKS = re.compile(r'test_\w+\(|assert ')


def kind_of(source: str) -> str:
    "What a cell is that only the page's author needs: 'Imports', 'Checks', 'Helpers of this page', or ''."
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return ''
    kinds = [type(s) for s in statements]
    if kinds and all(issubclass(k, (ast.Import, ast.ImportFrom)) for k in kinds): return 'Imports'
    if kinds and all(CHECKS.match(ast.get_source_segment(source, s) or '') for s in statements): return 'Checks'
    private = (s for s in statements if not getattr(s, 'name', '').startswith('_'))
    return '' if any(private) or not kinds else 'Helpers of this page'


def fold_author_cells(nb):
    "Imports, checks and private helpers stay on the page, folded: its first cells are for its reader."
    for cell in nb.cells:
        if cell.cell_type != 'code' or cell.outputs or re.match(r'#\s*\|', cell.source): continue
        if kind := kind_of(cell.source):
            cell.source = f'#| code-fold: true\n#| code-summary: "{kind}"\n{cell.source}'


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
    "Links to the texts above nbs/."
    link = rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(TOP)})(?:#[\w-]+)?)\)"
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = re.sub(link, r'](\1)', cell.source)


def drop_progress(nb):
    "Progress bars were for who waited."
    for cell in nb.cells:
        for output in cell.get('outputs', []):
            if 'text' in output:
                output.text = PROGRESS.sub('', ''.join(output.text)).lstrip('\r')
        if 'outputs' in cell:
            cell.outputs = [o for o in cell.outputs if o.get('text', ' ')]


def describe_pictures(nb):
    "A picture's words, which are stored beside it, become its alternative text."
    for output in (o for cell in nb.cells for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})):
        data, size = output['data'], output.get('metadata', {}).get('image/png', {})
        words = html.escape(''.join(data.get('text/plain', '')))
        source = 'data:image/png;base64,' + ''.join(data['image/png']).strip()
        width = f' width="{size["width"]}"' if 'width' in size else ''  # twice as many dots, for sharp screens
        data['text/html'] = f'<img alt="{words}" src="{source}"{width} class="img-fluid">'


class PageProcs(FilterDefaults):
    def base_procs(self):
        ours = {exec_show_docs: document_module, add_fold: fold_source, mv_exports: place_source}
        return [ours.get(p, p) for p in super().base_procs()]


def make_page(
    source: Path, # A notebook
    page: Path,   # Where it would go
) -> Path: # Where it went
    "Signatures and parameter comments of what a notebook exports, its definitions, names linked to their pages."
    nb = read_nb(source)
    for prepare in (split_title, link_to_top, show_source, fold_author_cells, drop_progress, describe_pictures):
        prepare(nb)
    PageProcs()(nb)
    if m := output_file.search(nb.cells[0].source):  # nbdev leaves it to Quarto to rename the page; links need it now
        nb.cells[0].source = output_file.sub('', nb.cells[0].source)
        page = page.with_stem(m[1])
    page.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, page)
    return page
