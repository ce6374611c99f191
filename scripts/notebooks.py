"""Run notebooks from top to bottom, and compare what cells print with the committed outputs, since these are the docs.

Times, addresses and temporary folders are masked, and numbers may differ in what another processor rounds. A cell whose
output can't be the same twice begins with `#| varies`. `run_tests.py --update` stores what is different."""
import base64
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

from forked import run_forked
from outcomes import ROOT, check

MASKS = [(re.compile(pattern), mask) for pattern, mask in (
    (r'\x1b\[[0-9;]*m', ''),                                            # colours
    (r'(?: at)? 0x[0-9a-f]+', ''),                                      # nbdev_clean takes them out too
    (r'[^\n\r]*\d%\|[^\n\r]*?/s(?:, [^\]\n]*)?\]', ''),                # progress bars
    (r'\d+e-\d+ at [\w.]+(?: of layer \d+)?', 'ROUNDING'),              # where it is largest depends on the processor
    (r'/tmp/[\w./-]+', '/tmp'),
    (r'127\.0\.0\.1:\d+', 'HOST'),
    (r'\bte_\w+\.\.\.', 'KEY'),
    (r'[^\n]*\r', ''),                                                  # what a progress bar wrote over
    (r'\d[\d,.]*(?:e-?\d+)? ?(?:ns|µs|us|ms|seconds|minutes|hours|s|min|h)\b', 'TIME'),
    (r'\d\d?:\d\d(?::\d\d)?', 'TIME'),
    (r'\d{4}-\d\d-\d\dT?', 'DATE'),
    (r'\d[\d,.]* ?(?:tokens|characters|samples?|it|rows|MB|GB|steps?)/s', 'SPEED'))]
PICTURES = 'image/png', 'data:image', '<svg'
NUMBER = re.compile(r'(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?')
NOISE = 1e-3  # what numbers that aren't whole may differ in, relatively; below it they are rounding alone


def texts(cell) -> list[str]:
    "What a cell shows as text: printed lines, values, tables, and the words of a picture; no warnings or progress."
    shown = {'': ''}
    for output in cell.get('outputs') or ():
        if output['output_type'] == 'stream':
            if output['name'] == 'stdout':
                shown[''] += ''.join(output['text'])
            continue
        data = output.get('data', {})
        if any(m in f"{[*data]}{''.join(data.get('text/html', ''))}" for m in PICTURES):
            shown[''] += f"a picture: {''.join(data.get('text/plain', ''))}\n"
            continue
        for kind in ('text/plain', 'text/html', 'text/markdown'):
            if text := ''.join(data.get(kind, '')):
                shown[kind] = shown.get(kind, '') + text
    return [masked(text) for text in shown.values()]


def masked(text: str) -> str:
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return '\n'.join(' '.join(line.split()) for line in text.splitlines()).strip()  # a column may be wider elsewhere


def same_number(a: str, b: str) -> bool:
    "Whole numbers are equal; others agree to a thousandth, or to one of their last digit, or are both rounding errors."
    if a == b: return True
    if not any('.' in n or 'e' in n for n in (a, b)): return False
    last = min(10.**-len(n.partition('.')[2]) for n in (a, b)) if 'e' not in a + b else 0
    x, y = float(a), float(b)
    return abs(x - y) <= max(1.01*last, NOISE*max(abs(x), abs(y))) or max(abs(x), abs(y)) < NOISE


def same(was: str, now: str) -> bool:
    "Whether two texts say the same."
    if NUMBER.sub('#', was) != NUMBER.sub('#', now): return False
    return all(map(same_number, NUMBER.findall(was), NUMBER.findall(now)))


def stale(was: list[str], now: list[str]) -> str | None:
    "What is different between what a cell shows in the file, and what it shows now."
    if len(was) == len(now) and all(map(same, was, now)): return None
    old, new = '\n'.join(was).splitlines(), '\n'.join(now).splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if not same(a, b)), min(len(old), len(new)))
    show = lambda lines: repr(lines[at][:300]) if at < len(lines) else 'nothing'
    return f'{show(old)} is in the file, and now it shows {show(new)}'


def with_small_picture(output: dict) -> dict:
    "Its picture in 256 colours: a third of the size, and no eye tells them apart."
    from PIL import Image
    if 'image/png' not in output.get('data', {}): return output
    out, full = io.BytesIO(), base64.b64decode(''.join(output['data']['image/png']))
    Image.open(io.BytesIO(full)).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True)
    output['data']['image/png'] = base64.b64encode(out.getvalue()).decode()
    return output


def run_notebook(path: Path, flags: list[str], update: bool) -> bool:
    "Whether a cell failed, or shows something else than what is committed. For a process of its own."
    os.chdir(path.parent)
    os.environ['IN_TEST'] = '1'
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    skipped = set(get_config().tst_flags.split()) - set(flags)
    nb, shell, faults = NBProcessor(path, process=True).nb, CaptureShell(path), []
    committed = read_nb(path)

    def leave_out(cell) -> bool:
        directives = getattr(cell, 'directives_', {})
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        return directives.get('eval:', [''])[0].lower() == 'false' or bool(skipped & directives.keys())

    def compare(cell):
        old = committed.cells[cell.idx_]
        if shell.exc or 'varies' in getattr(cell, 'directives_', {}) and texts(old) != ['']: return
        if fault := stale(texts(old), texts(cell)):
            line = cell.source.strip().splitlines()[-1]
            faults.append(f'cell {cell.idx_ + 1} ({line[:80]}): {fault}')
            old.outputs = [with_small_picture(o) for o in cell.get('outputs', [])]

    def fresh(cell) -> bool:
        if leave_out(cell): return True
        cell.outputs = []
        return False

    try:
        shell.run_all(nb, exc_stop=True, preproc=fresh, postproc=compare)
    except BaseException:
        print(shell.prettytb(fname=path))
        return True
    if faults and update:
        write_nb(committed, path)
    elif faults:
        print('committed outputs are stale, run the command again with --update:', *faults, sep='\n')
    return bool(faults) and not update


def find_notebooks(only: list[str]) -> list[Path]:
    "All of them, or those whose path holds one of these."
    found = [p.relative_to(ROOT) for p in sorted((ROOT/'nbs').rglob('*.ipynb'))]
    pages = [p for p in found if not any(part[0] in '._' for part in p.parts)]
    return [ROOT/p for p in pages if not only or any(o in str(p) for o in only)]


def notebook_job(path: Path, flags: list[str], update: bool, tmp: Path) -> Callable[[], None]:
    "A job that runs a notebook in a process of its own; a failure shows its cell."
    def one() -> str | None:
        said = tmp/f'{"-".join(path.relative_to(ROOT).parts)}.txt'
        fault = run_forked(said, run_notebook, path, flags, update)
        return fault and f'{path} {fault}'

    return lambda: check(f'notebook {path.relative_to(ROOT)}', one)
