"Write README.md and ARCHITECTURE.md from their notebooks: text, code, what it printed, and the pictures that it drew."
import base64
import re
from itertools import count
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
NOTICE = '<!-- Made from nbs/{} by scripts/build_readme.py (make prepare). Edit the notebook. -->'
DOCUMENTS = {'README.md': 'index.ipynb', 'ARCHITECTURE.md': 'architecture.ipynb'}
NOT_IN_A_LINK = re.compile(r'[][\n]')
local_link = re.compile(r'(\]\()(?![a-z]+:|[#/])([^)]+)\)')


def from_root(text: str) -> str:
    "Links in the notebook start in nbs/, those of a document at the top of the project."
    def fix(m):
        target = m[2].removeprefix('../') if m[2].startswith('../') else f'nbs/{m[2]}'
        for document, notebook in DOCUMENTS.items():
            target = document if target == f'nbs/{notebook}' else target
        return f'{m[1]}{target})'
    return local_link.sub(fix, text)


def save_pictures(cell, name: str, numbers: count) -> list[str]:
    "Write what a cell drew into nbs/, and link to it."
    links = []
    for data in (output.get('data', {}) for output in cell.outputs):
        if 'image/png' not in data: continue
        path, words = f'nbs/{name}_{next(numbers)}.png', NOT_IN_A_LINK.sub(' ', ''.join(data['text/plain']))
        (ROOT/path).write_bytes(base64.b64decode(''.join(data['image/png'])))
        links.append(f'![{words}]({path})')
    return links


def output_text(output: dict) -> str:
    "What an output shows as text; other HTML than a picture has no place in a README."
    if output.output_type == 'stream' and output.name == 'stdout': return ''.join(output.text)
    data = output.get('data', {})
    return '' if {'image/png', 'text/html'} & data.keys() else ''.join(data.get('text/plain', ''))


def code_block(cell, name: str, numbers: count) -> str:
    directives = re.findall(r'^#\s*\|\s*(\w+)', cell.source, re.M)
    if {'hide', 'default_exp', 'export'} & set(directives): return ''
    source = re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.M).strip()
    shown = ''.join(map(output_text, cell.outputs)).strip('\n')
    text = f'```text\n{shown}\n```' if shown else ''
    return '\n\n'.join(filter(None, [f'```python\n{source}\n```', text, *save_pictures(cell, name, numbers)]))


def document(notebook: str) -> str:
    "The text of a document that is made from a notebook in nbs/."
    cells = read_nb(ROOT/'nbs'/notebook).cells
    name, numbers = notebook.removesuffix('.ipynb'), count(1)
    def part(cell): return code_block(cell, name, numbers) if cell.cell_type == 'code' else from_root(cell.source)
    parts = [part(c) for c in cells if c.source.strip()]
    return '\n\n'.join([NOTICE.format(notebook), *(p.strip() for p in parts if p.strip())]) + '\n'


if __name__ == '__main__':
    for name, notebook in DOCUMENTS.items():
        (ROOT/name).write_text(document(notebook), encoding='utf-8')
