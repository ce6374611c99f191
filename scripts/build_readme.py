"Write README.md from nbs/index.ipynb: its text, its code and what the code printed."
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
NOTICE = '<!-- Made from nbs/index.ipynb by scripts/build_readme.py (make prepare). Edit the notebook. -->'
local_link = re.compile(r'(\]\()(?![a-z]+:|[#/])([^)]+)\)')


def from_root(text: str) -> str:
    "Links in the notebook start in nbs/, those of the README at the top of the project."
    def fix(m): return m[1] + (m[2].removeprefix('../') if m[2].startswith('../') else f'nbs/{m[2]}') + ')'
    return local_link.sub(fix, text)


def output_text(output: dict) -> str:
    "What an output shows as text; pictures and HTML have no place in a README."
    if output.output_type == 'stream' and output.name == 'stdout': return ''.join(output.text)
    data = output.get('data', {})
    return '' if {'image/png', 'text/html'} & data.keys() else ''.join(data.get('text/plain', ''))


def code_block(cell) -> str:
    directives = re.findall(r'^#\s*\|\s*(\w+)', cell.source, re.M)
    if {'hide', 'default_exp', 'export'} & set(directives): return ''
    source = re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.M).strip()
    shown = ''.join(map(output_text, cell.outputs)).strip('\n')
    return f'```python\n{source}\n```' + (f'\n\n```text\n{shown}\n```' if shown else '')


def readme(notebook: Path = ROOT/'nbs/index.ipynb') -> str:
    cells = read_nb(notebook).cells
    parts = [from_root(c.source) if c.cell_type == 'markdown' else code_block(c) for c in cells if c.source.strip()]
    return '\n\n'.join([NOTICE, *(p.strip() for p in parts if p.strip())]) + '\n'


if __name__ == '__main__':
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'README.md').write_text(readme(), encoding='utf-8')
