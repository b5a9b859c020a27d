"""What a text of tests contains: names that the program has to define, and tests that nothing in the text calls. Runs in the
tests' sandbox."""

import ast
import builtins
import traceback

TESTS, SETUP = "tests.py", "setup.py"
# Tests that mention one of these look at what the program prints or reads, or at files: each sandbox has its own.
_OUTSIDE = {
    *("redirect_stdout", "redirect_stderr", "stdin", "stdout", "stderr", "capsys", "capfd", "monkeypatch", "patch"),
    *("open", "tempfile", "shutil", "Path", "makedirs", "mkdir", "chdir", "environ"),
}


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


def looks_outside(tree):
    """Whether the tests mention standard input or output, or make files."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    return bool(names & _OUTSIDE)


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
