"""Imports point down the list of rooms: what the check finds in packages that are written here, and in this one."""
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import rooms
from patched import Module


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Makes a package of two rooms, `high` above `low`, from the source of its modules."
    import patched
    folder = tmp_path/'transformer_experiments'
    monkeypatch.setattr(patched, 'PACKAGE', folder)

    def make(**sources: str) -> dict[str, Module]:
        for name, source in sources.items():
            path = folder/f'{name.replace("__", "/")}.py'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        for room in (folder, *(d for d in folder.iterdir() if d.is_dir())):
            (room/'__init__.py').touch()
        found = [Module(p) for p in sorted(folder.rglob('*.py'))]
        return {m.name: m for m in found}
    return make


def faults(modules: dict[str, Module]) -> tuple[list[str], list]:
    found = [i for m in modules.values() if m.path.stem != '__init__' for i in rooms.imports_of(modules, m)]
    return [why for _, why in rooms.upward(found, ['high', 'low'])], rooms.circles(found)


def test_an_import_down_is_fine(package):
    modules = package(high__a='from transformer_experiments.low.b import f', low__b='f = 1')
    assert faults(modules) == ([], [])


@pytest.mark.parametrize('source', [
    'from transformer_experiments.high.a import x', 'import transformer_experiments.high.a',
    'from ..high.a import x', 'from ..high import a', 'from transformer_experiments.high import x',
    'def f():\n    from transformer_experiments.high.a import x'])
def test_an_import_up_is_named(package, source):
    modules = package(high__a='x = 1', low__b=source)
    if source.endswith('high import x'):
        modules['transformer_experiments.high'].path.write_text('from .a import x')
    [why], _ = faults(modules)
    assert why.startswith('transformer_experiments.low.b imports transformer_experiments.high.a, which is above it')


def test_a_circle_is_named_once(package):
    modules = package(low__a='from .b import x', low__b='def f():\n    from .c import y', low__c='from .a import z',
                      low__d='from .a import z')
    assert faults(modules) == ([], [tuple(f'transformer_experiments.low.{m}' for m in 'abc')])


def test_the_front_page_of_the_own_room(package):
    modules = package(low__a='from transformer_experiments.low import x', low__b='x = 1')
    modules['transformer_experiments.low'].path.write_text('from .b import x')
    [why], _ = faults(modules)
    assert 'the front page of its own room' in why


def test_a_room_that_is_not_listed(package):
    modules = package(other__a='from transformer_experiments.low.b import x', low__b='x = 1')
    [why], _ = faults(modules)
    assert why == 'other is not in the list of rooms in nbs/architecture.ipynb'


def test_this_package():
    "Every folder of notebooks is in the list, and no import points up."
    listed = rooms.read_rooms()
    folders = {p.parent.name for p in (ROOT/'nbs').glob('*/index.ipynb')} - {'tour'}
    assert folders <= set(listed) and len(listed) == len(set(listed))
    assert list(rooms.import_faults()) == []


def test_no_exported_name_hides_a_page():
    "`import transformer_experiments.room.page as page` finds what the room's front page calls so."
    for folder in (ROOT/'transformer_experiments').glob('*/'):
        if not (folder/'__init__.py').exists(): continue
        room = importlib.import_module(f'transformer_experiments.{folder.name}')
        pages = {p.stem for p in folder.glob('*.py')} - {'__init__'}
        found = {name for name in pages if not isinstance(getattr(room, name, sys), ModuleType)}
        assert not found, (folder.name, found)
