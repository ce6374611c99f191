"""Methods that `@patch` adds, put where a type checker and an editor look for them: in their classes.

`merge` writes the package with each patched method inside its class, for `scripts/lint.py` to check. `stubs` gives, for each module
whose classes are patched, a `.pyi` file with the signatures of all that is in it; these files are shipped with the package."""
import ast
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'transformer_experiments'
AS_METHOD = {'as_prop': 'property', 'cls_method': 'classmethod'}  # what an argument of `patch` makes of the function
KEPT_DECORATORS = {'property', 'classmethod', 'staticmethod', 'setter', 'cached_property', 'contextmanager', 'dataclass',
                   'overload', 'abstractmethod', 'cache', 'lru_cache', 'runtime_checkable', 'total_ordering', 'wraps'}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def name_of(node: ast.expr) -> str:
    "The last name of a decorator or an annotation: `property` of `@property`, `setter` of `@x.setter`, `patch` of `@patch(...)`."
    if isinstance(node, ast.Call): return name_of(node.func)
    if isinstance(node, ast.Attribute): return node.attr
    return node.id if isinstance(node, ast.Name) else ''


def patch_of(f: ast.stmt) -> ast.expr | None:
    "The `@patch` above a function, if there is one."
    return next((d for d in f.decorator_list if name_of(d) == 'patch'), None) if isinstance(f, FUNCTIONS) else None


@dataclass
class Module:
    "One file of the package."
    path: Path

    @property
    def name(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix('').parts
        return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)

    @cached_property
    def source(self) -> str: return self.path.read_text(encoding='utf-8')

    @cached_property
    def tree(self) -> ast.Module: return ast.parse(self.source)

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {n.name: n for n in self.tree.body if isinstance(n, ast.ClassDef)}

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        "For each name that comes from elsewhere in the package: its module, and its name there."
        package = self.name if self.path.stem == '__init__' else self.name.rpartition('.')[0]
        found = {}
        for n in self.tree.body:
            if not isinstance(n, ast.ImportFrom) or not n.level: continue
            base = package.split('.')[:len(package.split('.')) - n.level + 1]
            origin = '.'.join([*base, *([n.module] if n.module else [])])
            found |= {a.asname or a.name: (origin, a.name) for a in n.names}
        return found

    @property
    def patched(self) -> list[tuple[str, ast.FunctionDef]]:
        "Each patched function, with the class that its first parameter names."
        return [(name_of(n.args.args[0].annotation), n) for n in self.tree.body if patch_of(n) is not None]


def read_package() -> dict[str, Module]:
    return {m.name: m for p in sorted(PACKAGE.rglob('*.py')) if p.name != '_modidx.py' for m in [Module(p)]}


def owner_of(modules: dict[str, Module], module: Module, name: str) -> tuple[Module, str]:
    "The module that defines the class `name`, as `module` sees it."
    while name not in module.classes:
        if name not in module.imported: raise ValueError(f"{module.path} patches {name}, which no module of the package defines")
        origin, name = module.imported[name]
        module = modules[origin]
    return module, name


def find_patches(modules: dict[str, Module]) -> dict[tuple[str, str], list[tuple[Module, ast.FunctionDef]]]:
    "For each (module, class): the functions that are patched onto it, and where each stands."
    found = defaultdict(list)
    for module in modules.values():
        for name, f in module.patched:
            owner, cls = owner_of(modules, module, name)
            found[owner.name, cls].append((module, f))
    return found


# Signatures

def decorator(d: ast.expr) -> ast.expr | None:
    "The decorator as a method has it; None where a signature doesn't need it."
    if name_of(d) != 'patch': return d if name_of(d) in KEPT_DECORATORS else None
    for k in d.keywords if isinstance(d, ast.Call) else ():
        if k.arg in AS_METHOD: return ast.Name(AS_METHOD[k.arg])
    return None


def signature(f: ast.FunctionDef, method: bool = True) -> ast.FunctionDef:
    "The function without its body, without what its defaults compute, and without the annotation of `self`."
    new = ast.parse(ast.unparse(f)).body[0]
    new.decorator_list = [kept for d in new.decorator_list if (kept := decorator(d)) is not None]
    new.body = [ast.Expr(ast.Constant(...))]
    new.args.defaults = [d if isinstance(d, ast.Constant) else ast.Constant(...) for d in new.args.defaults]
    new.args.kw_defaults = [d if d is None or isinstance(d, ast.Constant) else ast.Constant(...) for d in new.args.kw_defaults]
    if method and new.args.args and new.args.args[0].arg in ('self', 'cls'): new.args.args[0].annotation = None
    return new


def imports_for(module: Module, f: ast.FunctionDef) -> list[str]:
    "What another module must import to use the signature of a function of this one."
    s = signature(f)
    annotations = [a.annotation for a in [*s.args.args, *s.args.kwonlyargs, s.args.vararg, s.args.kwarg] if a and a.annotation]
    names = {n.id for a in [*annotations, s.returns] if a for n in ast.walk(a) if isinstance(n, ast.Name)}
    lines = []
    for n in module.tree.body:
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            kept = [a for a in n.names if (a.asname or a.name).split('.')[0] in names]
            if not kept: continue
            if isinstance(n, ast.Import): lines.append(ast.unparse(ast.Import(kept)))
            elif not n.level: lines.append(ast.unparse(ast.ImportFrom(n.module, kept, 0)))
            else: lines += [f'from {module.imported[a.asname or a.name][0]} import {ast.unparse(a)}' for a in kept]
        elif getattr(n, 'name', None) in names: lines.append(f'from {module.name} import {n.name}')
        elif isinstance(n, ast.Assign): lines += [f'from {module.name} import {t.id}' for t in n.targets if name_of(t) in names]
    return lines


# The package with its methods in their classes

def as_method(module: Module, f: ast.FunctionDef) -> list[tuple[str, int]]:
    "A patched function's lines as a method's, each with its number in the module."
    start, first = f.decorator_list[0].lineno, f.args.args[0]
    lines = dict(enumerate(module.source.splitlines()[start - 1:f.end_lineno], start))
    at = patch_of(f)
    kept = decorator(at)
    lines |= dict.fromkeys(range(at.lineno, at.end_lineno + 1), '')
    if kept is not None: lines[at.lineno] = f'@{ast.unparse(kept)}'
    text = lines[first.lineno].encode()  # columns are counted in bytes
    name = first.col_offset + len(first.arg)
    lines[first.lineno] = (text[:name] + text[first.end_col_offset:]).decode()  # without the annotation of `self`
    return [('    ' + text if text else '', n) for n, text in lines.items()]


def merged(modules: dict[str, Module], patches: dict, module: Module) -> tuple[str, list[int]]:
    "A module's source with each patched method in its class, and the number that each line has in the module; 0: it has none."
    lines = dict(enumerate(module.source.splitlines(), 1))
    added = defaultdict(list)  # behind which line
    imports = []
    for name, cls in module.classes.items():
        for origin, f in patches.get((module.name, name), ()):
            if origin is module:
                added[cls.end_lineno] += as_method(module, f)
                for n in range(f.decorator_list[0].lineno, f.end_lineno + 1): lines[n] = ''
            else:
                imports += imports_for(origin, f)
                added[cls.end_lineno] += [(t, 0) for t in textwrap.indent(ast.unparse(signature(f)), '    ').splitlines()]
    docstring = ast.get_docstring(module.tree, clean=False) is not None
    top = module.tree.body[0].end_lineno if docstring else 0
    if imports:
        known = '\n    '.join(dict.fromkeys(imports))
        added[top] = [(t, 0) for t in f'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {known}'.splitlines()] + added[top]
    out = list(added[0])
    for n, text in lines.items(): out += [(text, n), *added.get(n, ())]
    return '\n'.join(t for t, _ in out) + '\n', [n for _, n in out]


def merge(folder: Path) -> dict[Path, list[int]]:
    "Write the merged package into a folder. For each of its files: the number of each line in the package's file."
    modules = read_package()
    patches = find_patches(modules)
    numbers = {}
    for module in modules.values():
        place = folder/module.path.relative_to(PACKAGE.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        text, numbers[place] = merged(modules, patches, module)
        place.write_text(text, encoding='utf-8')
    (folder/PACKAGE.name/'py.typed').touch()
    return numbers


# Stubs

def constant_type(value: ast.expr) -> ast.expr:
    "The type of a constant; otherwise Any."
    if isinstance(value, ast.Constant) and value.value is not None: return ast.Name(type(value.value).__name__)
    simple = {ast.List: 'list', ast.Tuple: 'tuple', ast.Dict: 'dict', ast.Set: 'set', ast.JoinedStr: 'str'}
    return ast.Name(simple.get(type(value), 'Any'))


def assigned(n: ast.Assign) -> list[str]:
    "The names that a statement binds."
    return [t.id for target in n.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target]) if isinstance(t, ast.Name)]


def declare(name: str, kind: ast.expr) -> ast.AnnAssign:
    return ast.AnnAssign(ast.Name(name), kind, None, 1)


def attribute_types(cls: ast.ClassDef, methods: list[ast.FunctionDef]) -> dict[str, ast.expr]:
    "What methods assign to `self`, with its type where a parameter's annotation or a constant says it."
    found = {}
    for f in methods:
        known = {a.arg: a.annotation for a in [*f.args.args, *f.args.kwonlyargs] if a.annotation}
        for n in ast.walk(f):
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Attribute) and name_of(n.target.value) == 'self':
                found[n.target.attr] = n.annotation
            if not isinstance(n, ast.Assign): continue
            for target in n.targets:
                several = isinstance(target, ast.Tuple)
                values = n.value.elts if several and isinstance(n.value, ast.Tuple) else None
                for i, t in enumerate(target.elts if several else [target]):
                    if not isinstance(t, ast.Attribute) or name_of(t.value) != 'self': continue
                    value = values[i] if values and len(values) == len(target.elts) else None if several else n.value
                    kind = known.get(value.id) if isinstance(value, ast.Name) else None
                    kind = kind or (constant_type(value) if isinstance(value, ast.Constant) else ast.Name('Any'))
                    if t.attr not in found or ast.unparse(found[t.attr]) == 'Any': found[t.attr] = kind
    return found


def class_stub(cls: ast.ClassDef, patched: list[ast.FunctionDef]) -> ast.ClassDef:
    new = ast.parse(ast.unparse(cls)).body[0]
    methods = [*(n for n in cls.body if isinstance(n, FUNCTIONS)), *patched]
    is_enum = any('Enum' in name_of(b) for b in cls.bases)
    body, names = [], {f.name for f in methods}
    for n in new.body:
        if isinstance(n, ast.AnnAssign):
            if n.value is not None and not isinstance(n.value, ast.Constant): n.value = ast.Constant(...)
            body.append(n)
            names.add(name_of(n.target))
        elif isinstance(n, ast.Assign):
            alias = isinstance(n.value, ast.Name) and n.value.id in {f.name for f in methods}
            targets = assigned(n)
            body += [n] if is_enum or alias or '__slots__' in targets else [declare(t, constant_type(n.value)) for t in targets]
            names |= set(targets)
    fields = {k: v for k, v in attribute_types(cls, methods).items() if k not in names}
    body += [declare(k, v) for k, v in fields.items()]
    new.body = [*body, *(signature(f) for f in methods)] or [ast.Expr(ast.Constant(...))]
    return new


def stub(modules: dict[str, Module], patches: dict, module: Module) -> str:
    "The signatures of a module, as a `.pyi` file."
    imports, body = ['from typing import Any'], []
    for n in module.tree.body:
        if isinstance(n, (ast.Import, ast.ImportFrom)): imports.append(ast.unparse(n))
        elif isinstance(n, ast.ClassDef):
            found = patches.get((module.name, n.name), ())
            for origin, f in found:
                if origin is not module: imports += imports_for(origin, f)
            body.append(class_stub(n, [f for _, f in found]))
        elif isinstance(n, FUNCTIONS) and patch_of(n) is None: body.append(signature(n, method=False))
        elif isinstance(n, ast.AnnAssign): body.append(declare(name_of(n.target), n.annotation))
        elif isinstance(n, ast.Assign):
            names = assigned(n)
            if '__all__' in names: body.append(n)
            else: body += [declare(name, constant_type(n.value) if len(names) == 1 else ast.Name('Any')) for name in names]
    written = '\n'.join(ast.unparse(n) for n in body)
    return f'# Made from {module.path.name} by scripts/patched.py (make prepare).\n' + '\n'.join(dict.fromkeys(imports)) + f'\n\n{written}\n'


def stubs() -> dict[Path, str]:
    "For each module with a patched class: the path of its stub, and its text."
    modules = read_package()
    patches = find_patches(modules)
    return {m.path.with_suffix('.pyi'): stub(modules, patches, m) for name in dict.fromkeys(k for k, _ in patches) for m in [modules[name]]}


def main(package: Path = PACKAGE):
    "Write the stubs, and remove those that nothing stands behind any more."
    made = stubs()
    for p in package.rglob('*.pyi'):
        if p not in made: p.unlink()
    for p, text in made.items(): p.write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
