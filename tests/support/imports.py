"""Who imports whom and who uses whose names, read by `ast`: also what stands in a function or under a condition."""
import ast
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """A name that a file takes from a module; None stands for the module itself."""

    module: str
    name: str | None
    line: int


def module_name(path, root):
    """``a/b/c.py`` is ``a.b.c``, ``a/b/__init__.py`` is ``a.b``."""
    parts = Path(path).relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(path, root):
    """All imports of a file below ``root``, relative ones by their full names."""
    package = Path(path).relative_to(root).parent.parts
    found = []
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, node.lineno) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*above, *([node.module] if node.module else [])])
            found += [Import(module, alias.name, node.lineno) for alias in node.names]
    return found


def sources(*places):
    """Python files below some folders, without those of caches."""
    files = [file for place in places for file in ([place] if place.suffix else place.rglob('*.py'))]
    return sorted(file for file in files if not any(part.startswith('.') for part in file.parts))


def graph(package, root):
    """``{module: modules of the same package that it imports}`` of every file of a package."""
    files = {module_name(path, root): path for path in sources(package)}
    edges = {}
    for module, path in files.items():
        edges[module] = set()
        for found in imports_of(path, root):
            inner = f'{found.module}.{found.name}'
            target = inner if inner in files else found.module
            if target in files:
                edges[module].add(target)
    return edges


def private(name):
    return isinstance(name, str) and name.startswith('_') and not name.startswith('__') and name != '_'


def private_names(*places):
    """The private names that sources define: functions, classes, variables, attributes of ``self``."""
    names = set()
    for path in sources(*places):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_itself(node):
                names.add(node.attr)
    return {name for name in names if private(name)}


def of_itself(attribute):
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ('self', 'cls')


def pokes(path, root, names):
    """``(line, name)`` wherever a file uses one of these names of something that is not its own."""
    found = [(taken.line, taken.name) for taken in imports_of(path, root) if taken.name in names]
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Attribute) and node.attr in names and not of_itself(node):
            found.append((node.lineno, node.attr))
        if isinstance(node, ast.Call):  # setattr(something, 'name', ...) and its like
            found += [(node.lineno, text.value) for text in node.args
                      if isinstance(text, ast.Constant) and private(text.value) and text.value in names]
    return found


def raised_texts(path):
    """The literal strings of all `raise` statements of a file."""
    return [text.value for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Raise)
            for text in ast.walk(node) if isinstance(text, ast.Constant) and isinstance(text.value, str)]
