"""
Python tests as source: what they expect is taken out of them, and tests that no program can
fail are refused.

    separate("assert f(2) == 4")  # (code of `assert __note__(f(2))`, ["0x4"])
"""
import __future__

import ast
import builtins
import functools
import threading
import warnings
from contextlib import suppress

from tasks.inside import CAUGHT, NOTE, text_of

PARSING = threading.Lock()  # for the warnings' filters, which all threads share


def runs_once(function, tree):
    """Does a function have no return, and is it named nowhere but in the call at hand?"""
    if any(isinstance(node, ast.Return) for node in ast.walk(function)):
        return False
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return names.count(function.name) == 1


def call_of(name, argument):
    """The expression `name(argument)`."""
    call = ast.parse(f"{name}()", mode="eval").body
    call.args = [argument]
    return call


def take_out(body, tree, texts):
    """Take the literals out of asserts in `body`, statements of `tree` that all run exactly
    once, and append their texts."""
    functions = {}
    for statement in body:
        match statement:
            case ast.Assert(ast.Compare(left, [ast.Eq()], [right])):
                for value, expected in (left, right), (right, left):
                    with suppress(ValueError, TypeError):  # it is no literal
                        texts.append(text_of(ast.literal_eval(expected)))
                        statement.test = call_of(NOTE, value)
                        statement.msg = None  # it may tell the literal, too
                        break
            case ast.FunctionDef(name, decorator_list=[]):
                functions[name] = statement
            case ast.Expr(ast.Call(ast.Name(name))) if name in functions:
                if runs_once(functions[name], tree):
                    take_out(functions[name].body, tree, texts)


# ----------------------------------------------------------------- tests that can not fail

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__"}  # may reach the program
CATCH_ALL = "BaseException", "Exception", "AssertionError"


def swallows(handler):
    """Does an except clause stop a failed assert, and go on without a word to the outside?"""
    kinds = handler.type and [node.id for node in ast.walk(handler.type) if is_name(node)]
    if kinds is not None and not set(kinds) & set(CATCH_ALL):
        return False
    for node in ast.walk(handler):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", None) != "print"
        if called or isinstance(node, ast.Raise):
            return False
    return True


def is_name(node):
    return isinstance(node, ast.Name)


def parts_of(node, waiting, owner=None):
    """A node and all nodes in it that run where it stands. A function's body runs where the
    function is named, or the class that it is in: it goes to `waiting`, {name: bodies}."""
    yield node
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, FUNCTIONS):
        parts = node.decorator_list + node.args.defaults
        own = [name for name in node.decorator_list if getattr(name, "id", None) in waiting]
        if own:  # a function of the tests may call what it decorates
            parts = parts + node.body
        waiting.setdefault(owner or node.name, []).extend(node.body)
    elif isinstance(node, ast.ClassDef):
        owner = owner or node.name
        waiting.setdefault(owner, [])
    elif isinstance(node, ast.Try) and any(map(swallows, node.handlers)):
        parts = node.handlers + node.orelse + node.finalbody
    elif isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
        parts = node.orelse  # the tests are not the main module
    for part in parts:
        yield from parts_of(part, waiting, owner)


def names_of(tree):
    """All names that the tests define, and Python's."""
    names = set(dir(builtins)) - DYNAMIC
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif is_name(node) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def can_fail(tree):
    """Is there an assert or a raise that runs, or a name that only the program can define?

    Test functions that nobody calls do not run, nor a unittest's class that nobody names."""
    own, waiting, named = names_of(tree), {}, set()
    running = list(tree.body)
    for statement in running:  # which grows
        for node in parts_of(statement, waiting):
            if isinstance(node, ast.Assert | ast.Raise):
                if any(map(is_name, ast.walk(node))) or isinstance(node, ast.Raise):
                    return True
            elif is_name(node) and isinstance(node.ctx, ast.Load):
                if node.id not in own:
                    return True
                named.add(node.id)
        for name in named & set(waiting):
            running += waiting[name]
            waiting[name] = []
    return False


# ------------------------------------------------------------------------------- the result


@functools.lru_cache(maxsize=16)  # a problem has many samples
def separate(tests):
    """Take the expected values out of Python tests: (code without them, their texts).

    `assert f(2) == 4` becomes `assert __note__(f(2))`, which always holds. That is done at the
    top level, and in a function, like HumanEval's `check`, that is called there, is named
    nowhere else and has no return. `except E` becomes `except __caught__(E)`.
    Raises ValueError where the tests are no Python, or nothing in them can fail.
    """
    texts = []
    try:
        with PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(tests)
            able = can_fail(tree)
            take_out(tree.body, tree, texts)
            for node in ast.walk(tree):
                if isinstance(node, ast.ExceptHandler) and node.type:
                    node.type = call_of(CAUGHT, node.type)
            # asserts stay, however this Python was started; annotations are not evaluated
            code = compile(
                ast.fix_missing_locations(tree), "tests", "exec", dont_inherit=True, optimize=0,
                flags=__future__.annotations.compiler_flag,
            )
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests {tests[:60]!r} are not Python: {error}") from None
    if not able:
        raise ValueError(
            f"tests {tests[:60]!r}: nothing that runs in them can fail, so any program would "
            "pass; write asserts at the top level, or call the functions that have them"
        )
    return code, texts
