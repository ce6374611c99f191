"""Imports point down the list of rooms in nbs/architecture.ipynb, and no module imports itself by way of others.

Looks at what the notebooks export; examples and tests on a page may import anything."""
import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from changes import defining
from patched import PACKAGE, ROOT, Module, read_package

LIST = ROOT/'nbs'/'architecture.ipynb'
ROW = re.compile(r'^\| \d+ \| \[`(\w+)`\]', re.M)


def read_rooms() -> list[str]:
    "The rooms from the top down. Raises `ValueError` if the page has no list of them."
    cells = json.loads(LIST.read_text(encoding='utf-8'))['cells']
    rooms = ROW.findall('\n'.join(''.join(c['source']) for c in cells))
    if not rooms:
        raise ValueError(f"{LIST.relative_to(ROOT)} has no table of rooms, with rows such as "
                         "'| 1 | [`cli`](cli/index.ipynb) |'")
    return rooms


@dataclass(frozen=True)
class Import:
    "One module of the package imports another."
    importer: str
    imported: str
    row: int # In the importer's file


def imports_of(modules: dict[str, Module], module: Module) -> Iterator[Import]:
    "All imports from the package, those inside functions too; a front page's name counts as one from its definition."
    package = module.name if module.path.stem == '__init__' else module.name.rpartition('.')[0]
    for n in ast.walk(module.tree):
        if isinstance(n, ast.Import):
            yield from (Import(module.name, a.name, n.lineno) for a in n.names if a.name in modules)
        if not isinstance(n, ast.ImportFrom): continue
        above = package.split('.')[:len(package.split('.')) - n.level + 1] if n.level else []
        origin = '.'.join([*above, *([n.module] if n.module else [])])
        if origin not in modules: continue
        for a in n.names:
            yield Import(module.name, defining(modules, origin, a.name), n.lineno)
        if origin == package != module.name:
            yield Import(module.name, origin, n.lineno) # the front page of its own room


def room_of(module: str) -> str | None:
    "None for the package itself, which every module may import."
    parts = module.split('.')
    return parts[1] if len(parts) > 1 else None


def upward(found: Iterable[Import], rooms: list[str]) -> Iterator[tuple[Import, str]]:
    "Imports that point up the list, and imports of the front page of a module's own room."
    for i in found:
        here, there = room_of(i.importer), room_of(i.imported)
        if there is None or i.importer == i.imported: continue
        if missing := next((r for r in (here, there) if r and r not in rooms), None):
            yield i, f'{missing} is not in the list of rooms in {LIST.relative_to(ROOT)}'
        elif here == there and i.imported.count('.') == 1:
            yield i, f'imports the front page of its own room, {i.imported}: import from the page that defines the name'
        elif here is None or rooms.index(here) > rooms.index(there):
            yield i, f'{i.importer} imports {i.imported}, which is above it in the list of rooms'


def circles(found: Iterable[Import]) -> list[list[str]]:
    "Modules that import each other, directly or by way of others: each group once, in order of their names."
    needs: dict[str, set[str]] = {}
    for i in found:
        if i.importer != i.imported:
            needs.setdefault(i.importer, set()).add(i.imported)
    reached = {module: reachable(needs, module) for module in needs}
    groups = {module: {other for other in reached[module] if module in reached.get(other, ())} for module in needs}
    return sorted({tuple(sorted(group)) for group in groups.values() if group})


def reachable(needs: dict[str, set[str]], start: str) -> set[str]:
    found, todo = set(), list(needs[start])
    while todo:
        module = todo.pop()
        if module in found: continue
        found.add(module)
        todo += needs.get(module, ())
    return found


def import_faults() -> Iterator[tuple[str, str, str, str]]:
    "File, place, rule and message of each fault in the package."
    modules, rooms = read_package(), read_rooms()
    front_page = f'{PACKAGE.name}.'
    pages = {name: m for name, m in modules.items() if m.path.stem != '__init__'}
    found = [i for m in pages.values() for i in imports_of(modules, m)]
    for i, why in upward(found, rooms):
        yield str(modules[i.importer].path.relative_to(ROOT)), f':{i.row}', 'import-up', why
    for circle in circles(found):
        path = modules[circle[0]].path.relative_to(ROOT)
        yield str(path), '', 'import-circle', ' <-> '.join(name.removeprefix(front_page) for name in circle)
