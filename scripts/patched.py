"""Methods that `@patch` adds, put where a type checker and an editor look for them: in their classes.

`merge` writes the package with each patched method inside its class, for `scripts/lint.py` to check. `stubs` gives the
signatures of each module whose classes are patched, as a `.pyi` file that is shipped with the package."""
import ast
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'transformer_experiments'
AS_METHOD = {'as_prop': 'property', 'cls_method': 'classmethod'}  # what an argument of `patch` makes of the function
KEPT_DECORATORS = {'property', 'classmethod', 'staticmethod', 'setter', 'cached_property', 'contextmanager',
                   'dataclass', 'overload', 'abstractmethod', 'cache', 'lru_cache', 'runtime_checkable'}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
ELLIPSIS = re.compile(r':\n\s+\.\.\.')


def name_of(node: ast.expr) -> str:
    "The last name of a decorator or an annotation: `setter` of `@x.setter`, `patch` of `@patch(...)`."
    if isinstance(node, ast.Call): return name_of(node.func)
    if isinstance(node, ast.Attribute): return node.attr
    return node.id if isinstance(node, ast.Name) else ''


def patch_of(f: ast.stmt) -> ast.expr | None:
    "The `@patch` above a function, if there is one."
    if not isinstance(f, FUNCTIONS): return None
    return next((d for d in f.decorator_list if name_of(d) == 'patch'), None)


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


    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        "Functions of the module, and methods of its classes as `Class.name`."
        found = {n.name: n for n in self.tree.body if isinstance(n, FUNCTIONS)}
        methods = {f'{c}.{n.name}': n for c, cls in self.classes.items() for n in cls.body if isinstance(n, FUNCTIONS)}
        return found | methods

    @property
    def attached(self) -> list[tuple[str, ast.FunctionDef]]:
        "Each `Class.name = ...` of the module, as a method of that name, with the class."
        found = []
        for n in self.tree.body:
            if not isinstance(n, ast.Assign): continue
            for target in n.targets:
                for t, value in matched(target, n.value):
                    if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name):
                        found.append((t.value.id, self.attached_method(t.attr, value or ast.Constant(None))))
        return [(name, f) for name, f in found if name in self.classes or name in self.imported]

    def attached_method(self, name: str, value: ast.expr) -> ast.FunctionDef:
        "A function that is put into a class under another name, or a property of one; otherwise it may be any object."
        is_property = isinstance(value, ast.Call) and name_of(value.func) == 'property'
        known = self.functions.get(ast.unparse(value.args[0] if is_property and value.args else value))
        f = signature(known) if known else ast.parse('def f(self, *args, **kwargs): ...').body[0]
        if is_property and not known:
            f = ast.parse('def f(self): ...').body[0]
        if not known and not is_property:
            is_property = True  # any object
        f.name = name
        if is_property:
            f.decorator_list = [ast.Name('property')]
        return f


def read_package() -> dict[str, Module]:
    return {m.name: m for p in sorted(PACKAGE.rglob('*.py')) if p.name != '_modidx.py' for m in [Module(p)]}


def owner_of(modules: dict[str, Module], module: Module, name: str) -> tuple[Module, str]:
    "The module that defines the class `name`, as `module` sees it."
    while name not in module.classes:
        if name not in module.imported: raise ValueError(f"{module.path} patches {name}, which isn't the package's")
        origin, name = module.imported[name]
        module = modules[origin]
    return module, name


def find_patches(modules: dict[str, Module]) -> dict[tuple[str, str], list[tuple[Module, ast.FunctionDef]]]:
    "For each (module, class): the functions that are patched onto it, and where each stands."
    found = defaultdict(list)
    for module in modules.values():
        for name, f in [*module.patched, *module.attached]:
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
    for defaults in (new.args.defaults, new.args.kw_defaults):
        defaults[:] = [d if d is None or isinstance(d, ast.Constant) else ast.Constant(...) for d in defaults]
    if method and new.args.args and new.args.args[0].arg in ('self', 'cls'):
        new.args.args[0].annotation = None
    return new


def imports_for(module: Module, f: ast.FunctionDef, into: Module) -> list[str]:
    "What another module must import to use the signature of a function of this one; not what it defines itself."
    s = signature(f)
    args = [a for a in (*s.args.args, *s.args.kwonlyargs, s.args.vararg, s.args.kwarg) if a is not None]
    annotations = [a for a in (*(a.annotation for a in args), s.returns) if a is not None]
    names = {n.id for a in annotations for n in ast.walk(a) if isinstance(n, ast.Name)}
    lines = []
    for n in module.tree.body:
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            kept = [a for a in n.names if (a.asname or a.name).split('.')[0] in names]
            if not kept: continue
            if isinstance(n, ast.Import):
                lines.append(ast.unparse(ast.Import(kept)))
            elif not n.level:
                lines.append(ast.unparse(ast.ImportFrom(n.module, kept, 0)))
            else:
                origins = [(module.imported[a.asname or a.name][0], a) for a in kept]
                lines += [f'from {origin} import {ast.unparse(a)}' for origin, a in origins if origin != into.name]
        elif getattr(n, 'name', None) in names:
            lines.append(f'from {module.name} import {n.name}')
        elif isinstance(n, ast.Assign):
            lines += [f'from {module.name} import {t.id}' for t in n.targets if name_of(t) in names]
    return lines


# The package with its methods in their classes

def as_method(module: Module, f: ast.FunctionDef) -> list[tuple[str, int]]:
    "A patched function's lines as a method's, each with its number in the module."
    start, first = f.decorator_list[0].lineno, f.args.args[0]
    lines = dict(enumerate(module.source.splitlines()[start - 1:f.end_lineno], start))
    at = patch_of(f)
    kept = decorator(at)
    lines |= dict.fromkeys(range(at.lineno, at.end_lineno + 1), '')
    if kept is not None:
        lines[at.lineno] = f'@{ast.unparse(kept)}'
    text = lines[first.lineno].encode()  # columns are counted in bytes
    name = first.col_offset + len(first.arg)
    lines[first.lineno] = (text[:name] + text[first.end_col_offset:]).decode()  # without the annotation of `self`
    return [('    ' + text if text else '', n) for n, text in lines.items()]


def merged(modules: dict[str, Module], patches: dict, module: Module) -> tuple[str, list[int]]:
    "A module's source with each patched method in its class, and each line's number in the module, or 0."
    lines = dict(enumerate(module.source.splitlines(), 1))
    added = defaultdict(list)  # behind which line
    imports = []
    for name, cls in module.classes.items():
        for origin, f in patches.get((module.name, name), ()):
            if origin is module and patch_of(f) is not None:
                added[cls.end_lineno] += as_method(module, f)
                for n in range(f.decorator_list[0].lineno, f.end_lineno + 1):
                    lines[n] = ''
            else:
                if origin is not module:
                    imports += imports_for(origin, f, module)
                written = textwrap.indent(ast.unparse(signature(f)), '    ')
                added[cls.end_lineno] += [(t, 0) for t in written.splitlines()]
    if imports:
        top = module.tree.body[0].end_lineno if ast.get_docstring(module.tree) is not None else 0
        block = ['from typing import TYPE_CHECKING', 'if TYPE_CHECKING:', *(f'    {i}' for i in dict.fromkeys(imports))]
        added[top] = [(t, 0) for t in block] + added[top]
    out = list(added[0])
    for n, text in lines.items():
        out += [(text, n), *added.get(n, ())]
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
    targets = [t for target in n.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def declare(name: str, kind: ast.expr, class_variable: bool = False) -> ast.AnnAssign:
    "An annotated name. What a dataclass has beside its fields must be a class variable in a stub."
    annotation = ast.Subscript(ast.Name('ClassVar'), kind) if class_variable else kind
    return ast.AnnAssign(ast.Name(name), annotation, None, 1)


def assigned_to_self(f: ast.FunctionDef) -> Iterable[tuple[str, ast.expr | None, ast.expr | None]]:
    "Each attribute that a method sets: its name, its annotation and its value, where they are there."
    for n in ast.walk(f):
        if isinstance(n, ast.AnnAssign):
            pairs = [(n.target, n.annotation, None)]
        elif isinstance(n, ast.Assign):
            pairs = [(t, None, v) for target in n.targets for t, v in matched(target, n.value)]
        else:
            continue
        for target, annotation, value in pairs:
            if isinstance(target, ast.Attribute) and name_of(target.value) == 'self':
                yield target.attr, annotation, value


def matched(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr | None]]:
    "The targets of an assignment, each with its own value where that can be seen."
    if not isinstance(target, ast.Tuple): return [(target, value)]
    apart = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
    return [(t, value.elts[i] if apart else None) for i, t in enumerate(target.elts)]


def attribute_types(methods: list[ast.FunctionDef]) -> dict[str, ast.expr]:
    "What methods assign to `self`, with its type where an annotation, a parameter or a constant says it."
    found: dict[str, ast.expr] = {}
    for f in methods:
        known = {a.arg: a.annotation for a in [*f.args.args, *f.args.kwonlyargs] if a.annotation}
        for name, kind, value in assigned_to_self(f):
            if kind is None and isinstance(value, ast.Name):
                kind = known.get(value.id)
            if kind is None:
                kind = constant_type(value) if isinstance(value, ast.Constant) else ast.Name('Any')
            if name not in found or ast.unparse(found[name]) == 'Any':
                found[name] = kind
    return found


def field_stubs(n: ast.stmt, methods: set[str], is_enum: bool, is_dataclass: bool) -> list[ast.stmt]:
    "What the body of a class declares by one statement."
    if isinstance(n, ast.AnnAssign):
        if n.value is not None and not isinstance(n.value, ast.Constant):
            n.value = ast.Constant(...)
        return [n]
    if not isinstance(n, ast.Assign): return []
    alias = isinstance(n.value, ast.Name) and n.value.id in methods
    if is_enum or alias or '__slots__' in assigned(n): return [n]
    return [declare(name, constant_type(n.value), is_dataclass) for name in assigned(n)]


def class_stub(cls: ast.ClassDef, patched: list[ast.FunctionDef]) -> ast.ClassDef:
    new = ast.parse(ast.unparse(cls)).body[0]
    methods = [*(n for n in cls.body if isinstance(n, FUNCTIONS)), *patched]
    later = {f.name for f in patched}
    methods = [f for i, f in enumerate(methods) if f.name not in later or f in patched or f.decorator_list]
    names = {f.name for f in methods}
    is_enum = any('Enum' in name_of(b) for b in cls.bases)
    is_dataclass = any(name_of(d) == 'dataclass' for d in cls.decorator_list)
    body = [declared for n in new.body for declared in field_stubs(n, names, is_enum, is_dataclass)]
    for n in body:
        names |= set(assigned(n)) if isinstance(n, ast.Assign) else {name_of(n.target)}
    body += [declare(k, v, is_dataclass) for k, v in attribute_types(methods).items() if k not in names]
    new.body = [*body, *(signature(f) for f in methods)] or [ast.Expr(ast.Constant(...))]
    return new


def statement_stub(modules: dict[str, Module], patches: dict, module: Module, n: ast.stmt) -> list[ast.stmt]:
    "A statement of a module as its stub has it; imports come first."
    if isinstance(n, (ast.Import, ast.ImportFrom)): return [n]
    if isinstance(n, ast.ClassDef):
        found = patches.get((module.name, n.name), ())
        needed = [i for origin, f in found if origin is not module for i in imports_for(origin, f, module)]
        return [*(ast.parse(i).body[0] for i in needed), class_stub(n, [f for _, f in found])]
    if isinstance(n, FUNCTIONS): return [] if patch_of(n) is not None else [signature(n, method=False)]
    if isinstance(n, ast.AnnAssign): return [declare(name_of(n.target), n.annotation)]
    if not isinstance(n, ast.Assign): return []
    names = assigned(n)
    if '__all__' in names: return [n]
    return [declare(name, constant_type(n.value) if len(names) == 1 else ast.Name('Any')) for name in names]


def stub(modules: dict[str, Module], patches: dict, module: Module) -> str:
    "The signatures of a module, as a `.pyi` file."
    body = [s for n in module.tree.body for s in statement_stub(modules, patches, module, n)]
    imports = dict.fromkeys(ast.unparse(n) for n in body if isinstance(n, (ast.Import, ast.ImportFrom)))
    rest = [ast.unparse(n) for n in body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    text = '\n'.join(['from typing import Any, ClassVar', *imports, '', *rest])
    return f'# Made from {module.path.name} by scripts/patched.py (make prepare).\n{ELLIPSIS.sub(": ...", text)}\n'


def stubs() -> dict[Path, str]:
    "For each module with a patched class: the path of its stub, and its text."
    modules = read_package()
    patches = find_patches(modules)
    patched = [modules[name] for name in dict.fromkeys(k for k, _ in patches)]
    return {m.path.with_suffix('.pyi'): stub(modules, patches, m) for m in patched}


def main(package: Path = PACKAGE):
    "Write the stubs, and remove those that nothing stands behind any more."
    made = stubs()
    for p in package.rglob('*.pyi'):
        if p not in made:
            p.unlink()
    for p, text in made.items():
        p.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
