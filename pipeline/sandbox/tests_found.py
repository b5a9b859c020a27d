"""What a text of tests contains: names that the program has to define, and tests that nothing in the text calls. Runs in the
tests' sandbox."""

import ast
import builtins
import sys
import traceback

TESTS, SETUP = "tests.py", "setup.py"
# Tests that use one of these look at what the program prints or reads, or at files: each sandbox has its own. The second ones
# only where they are a module's, because variables and the program's functions have such names too.
_STREAMS = {"redirect_stdout", "redirect_stderr", "stdin", "stdout", "stderr", "capsys", "capfd", "monkeypatch"}
_STREAMS |= {"tempfile", "shutil", "subprocess"}
_OF_MODULES = {"patch", "open", "Path", "makedirs", "mkdir", "chdir", "environ"}
_STOPS = {"StopIteration", "StopAsyncIteration"}


def is_only_looked_into(name, tree):
    """Whether a name is used as a module is: ``name.something``, never by itself."""
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return all(id(node) in bases for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name)


def names_in(source):
    return names_of(ast.parse(source))


def free_names(tree, entry_point):
    """Names that the tests use and do not define: the program has to. What they import from ``solution`` is among them."""
    used, bound = set(names_in(entry_point or "0")), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            used.update(alias.name for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return (used - bound) | (names_in(entry_point) - set(dir(builtins)) if entry_point else set())


def looks_outside(tree, setup):
    """Whether the tests, by their own imports or the setup's, use standard input or output, or make files."""
    imported, bound = {}, set()  # by the name that they give it; their own variables and functions
    for node in [*ast.walk(ast.parse(setup)), *ast.walk(tree)]:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "solution"):
            imported.update({(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)

    def is_outside(node):
        if isinstance(node, ast.Name) and node.id in imported:
            return imported[node.id] in _STREAMS | _OF_MODULES
        if isinstance(node, ast.Name):
            return node.id in (_STREAMS | {"open"}) - bound
        if not isinstance(node, ast.Attribute) or node.attr in _STREAMS:
            return isinstance(node, ast.Attribute)
        base = node
        while isinstance(base, ast.Attribute):
            base = base.value
        is_module = isinstance(base, ast.Name) and base.id in imported.keys() | sys.stdlib_module_names - bound
        return is_module and node.attr in _OF_MODULES

    return any(map(is_outside, ast.walk(tree)))


def where_loops_may_end(tree):
    """The numbers of the lines where the tests expect the program to raise StopIteration: a ``try`` that handles it, a ``with``
    or a call that is given it."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            expects, body = node.handlers, node.body
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            expects, body = node.items, node.body
        elif isinstance(node, ast.Call):
            expects, body = [part for part in node.args if isinstance(part, (ast.Name, ast.Tuple))], [node]
        else:
            continue
        if any(names_of(part) & _STOPS for part in expects):
            lines.update(range(body[0].lineno, body[-1].end_lineno + 1))
    return lines


def uncalled(tree, cases=()):
    """The functions and classes of the tests that a test runner would find: no statement reaches them by name, or they are
    test cases, whose own runner would keep their failures to itself."""
    defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    waiting = [node for node in tree.body if node not in defined.values()]
    reached = set()
    while waiting:
        for name in names_of(waiting.pop()) & set(defined) - reached:
            reached.add(name)
            waiting.append(defined[name])
    return [node for name, node in defined.items() if name not in reached or name in cases]


def names_of(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def required(function):
    """How many positional arguments a function cannot do without, and keyword-only ones."""
    given = function.args
    return len(given.posonlyargs + given.args) - len(given.defaults) + sum(default is None for default in given.kw_defaults)


def where(error, tests):
    """Which line of the tests an exception came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == SETUP:
            return f" at line {frame.lineno} of the setup"
        if frame.filename == TESTS:
            return f" at line {frame.lineno} of the tests: {tests.splitlines()[frame.lineno - 1].strip()[:120]}"
    return ""
