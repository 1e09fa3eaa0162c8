"""
Run a program and its tests in one interpreter, where the tests see copies of what it gives them.

tasks/sandbox.py runs this file's text in the program's interpreter (`python -c`). Parts of it
decide verdicts there, so it uses nothing that is not Python's.

Copies. An object whose `__eq__` returns True would pass `assert 5 == f(3)`, and one whose
`__abs__` returns 0 would pass `assert abs(f(3) - 5) < 1e-6`. So whatever the tests get from the
program is a copy that knows only Python's own types (`for_tests`). An object of any other class
is a `Foreign`: it gives copies of its attributes, its items and what its methods return, and
its operators work with objects of the program and with none of the tests'.
"""
import builtins
import collections
import copy
import hashlib
import marshal
import operator
import os
import sys
import types
import weakref

NOTE, CAUGHT = "__note__", "__caught__"  # what tasks/asserts.py writes into the tests


def text_of(value):
    """A text that equal values share, and no others: 1, 1.0 and True are equal.

    Values are numbers, strings, None, and lists, tuples, sets and dicts of them; subclasses
    count as what they derive from. Raises TypeError for all else.
    """
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ",".join(map(text_of, value)) + ")"
    if isinstance(value, (set, frozenset, type({}.keys()), type({}.items()))):
        return "{" + ",".join(sorted(map(text_of, value))) + "}"
    if isinstance(value, dict):
        return "dict" + text_of(value.items())
    if value is None:
        return "None"
    if isinstance(value, complex):
        return text_of(value.real) if value.imag == 0 else repr(complex(value) + 0)
    for kind, text in (int, hex), (float, repr):
        try:
            if kind(value) == value:
                return text(kind(value))
        except (TypeError, ValueError, OverflowError):  # not of this kind
            pass
    raise TypeError(f"{value!r} is compared with no literal")


def proof_of(key, texts):
    """64 bytes that only who knows a run's key and the texts of its values can print."""
    return hashlib.sha256(repr([key, texts]).encode()).hexdigest().encode()


# ------------------------------------------------------------------------------- the copies

ATOMS = bool, int, float, complex, str, bytes, type(None), type(...), range, types.ModuleType
ATOMS = {id(kind) for kind in ATOMS}  # a program's class may equal another, so by identity
SCALARS = {  # a class, and what makes of a subclass's value one of its own
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: lambda value: bytearray.__getitem__(value, slice(None)),
}
MUTABLE = list, set, collections.deque, collections.Counter, collections.OrderedDict, dict
CONTAINERS = tuple, frozenset, *MUTABLE
EXACT = {id(kind) for kind in CONTAINERS}
# the classes of these, as long as they hold no Python objects, compare as they say
LIBRARIES = set("array datetime decimal fractions numpy pandas scipy sympy torch".split())
BUILTINS = dict(vars(builtins))


class Names(dict):
    """The tests' names. What they do not define is the program's, and else it is Python's."""

    program = {}

    def __missing__(self, name):
        value = self.program[name]
        return value if value is BUILTINS.get(name) else for_tests(value)

    def __setitem__(self, name, value):
        self.program[name] = for_program(value, [])  # it may need an import of the tests
        dict.__setitem__(self, name, value)


NAMES = Names(__name__="program", __builtins__=BUILTINS)
SHOWN = weakref.WeakValueDictionary()  # {id of an object: its Foreign}, so that `is` holds


def is_own(value, kind):
    """Is a value a function or a class of the tests, or an object of such a class?"""
    if kind is types.FunctionType:
        return value.__globals__ is NAMES
    name = value.__name__ if kind is type else kind.__name__
    found = dict.get(NAMES, name)
    return found is not None and (found is kind or found is value)


def is_of_library(value, kind):
    module = kind.__module__
    if module.partition(".")[0] not in LIBRARIES or callable(value):
        return False
    if getattr(getattr(value, "dtype", None), "hasobject", False):
        return False
    return getattr(sys.modules.get(module), kind.__name__, None) is kind


def for_tests(value):
    """A copy of a value of the program: plain data, or a Foreign."""
    kind = type(value)
    if id(kind) in ATOMS:
        return value
    if id(kind) in EXACT:
        return changed(value, kind, for_tests)
    if is_own(value, kind) or is_of_library(value, kind):
        return value
    for base, copied in SCALARS.items():
        if issubclass(kind, base):
            return copied(value)
    for base in CONTAINERS:
        if issubclass(kind, base):
            return changed(value, base, for_tests)
    if kind is type({}.keys()):
        return dict.fromkeys(map(for_tests, value)).keys()
    if kind is type({}.items()):
        return dict(map(for_tests, value)).items()
    if kind is types.CoroutineType:
        return finished(value)
    shown = SHOWN.get(id(value))
    if shown is None:
        shown = object.__new__(Foreign)
        OBJECT.__set__(shown, value)
        SHOWN[id(value)] = shown
    return shown


def for_program(value, copies):
    """A value of the tests as the program gets it: the object of a Foreign, and a copy of a
    list, set or dict, which is appended to `copies` with the tests' own: (own, copy)."""
    kind = type(value)
    if kind is Foreign:
        return OBJECT.__get__(value)
    if id(kind) not in EXACT and kind is not collections.defaultdict:
        return value

    def inner(item):
        return for_program(item, copies)

    if kind in (tuple, frozenset):
        return changed(value, kind, inner)
    if kind in (list, set, dict):
        copied = changed(value, kind, inner)
    else:  # it may have more than items: a length at most, or what is missing
        copied = copy.copy(value)
        refill(copied, value, inner)
    copies.append((value, copied))
    return copied


def changed(value, base, change):
    """A container of class `base` with all items of another, each after a change."""
    if issubclass(base, dict):
        return base({change(key): change(item) for key, item in base.items(value)})
    items = list(base.__iter__(value))
    if not ATOMS.issuperset(map(id, map(type, items))):  # as most are: this is fast
        items = list(map(change, items))
    if base is tuple and hasattr(value, "_fields"):
        return collections.namedtuple(type(value).__name__, value._fields)(*items)
    return base(items)


def refill(container, other, change):
    """Put the items of another container in the place of those that one has."""
    base = next(kind for kind in MUTABLE if isinstance(other, kind))
    fresh = changed(other, base, change)
    container.clear()
    add = container.extend if hasattr(container, "extend") else container.update
    add(fresh)


async def finished(coroutine):
    return for_tests(await coroutine)


def call(function, *args, **settings):
    """Call a function of the program with copies. What it did to the copies of lists, sets and
    dicts happens to the tests' own, when it has returned."""
    copies = []
    args = [for_program(value, copies) for value in args]
    settings = {name: for_program(value, copies) for name, value in settings.items()}
    own = {id(copied): value for value, copied in copies}

    def back(value):
        return own[id(value)] if id(value) in own else for_tests(value)

    try:
        result = function(*args, **settings)
    finally:
        for value, copied in copies:
            refill(value, copied, back)
    return back(result)


class Foreign:
    """An object of the program, as the tests see it."""

    __slots__ = "_object", "__weakref__"

    def __getattribute__(self, name):
        own = OBJECT.__get__(self)
        if name in ("__copy__", "__deepcopy__", "__mro_entries__"):  # the methods below
            return object.__getattribute__(self, name)
        if name == "__class__":  # for isinstance, and two more for issubclass
            return type(own)
        value = getattr(own, name)
        return value if name in ("__bases__", "__mro__") else for_tests(value)

    def __setattr__(self, name, value):
        setattr(OBJECT.__get__(self), name, for_program(value, []))

    def __delattr__(self, name):
        delattr(OBJECT.__get__(self), name)

    def __call__(self, *args, **settings):
        return call(OBJECT.__get__(self), *args, **settings)

    def __enter__(self):
        return call(OBJECT.__get__(self).__enter__)

    def __exit__(self, *error):
        OBJECT.__get__(self).__exit__(*error)  # it may not swallow the error of an assert

    def __instancecheck__(self, value):
        return isinstance(for_program(value, []), OBJECT.__get__(self))

    def __subclasscheck__(self, kind):
        return issubclass(for_program(kind, []), OBJECT.__get__(self))

    def __mro_entries__(self, bases):  # a class of the tests derives from it
        return (OBJECT.__get__(self),)


OBJECT = Foreign.__dict__["_object"]
FORWARDED = {
    "__iter__": iter, "__next__": next, "__reversed__": reversed, "__len__": len,
    "__getitem__": operator.getitem, "__setitem__": operator.setitem,
    "__delitem__": operator.delitem, "__str__": str, "__repr__": repr, "__hash__": hash,
    "__bool__": bool, "__int__": int, "__float__": float, "__complex__": complex,
    "__index__": operator.index, "__abs__": abs, "__neg__": operator.neg, "__round__": round,
    "__copy__": copy.copy, "__deepcopy__": lambda value, memo: copy.deepcopy(value),
}
OPERATORS = "eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor".split()


def forwarded(function):
    def method(self, *args):
        return call(function, self, *args)

    return method


def between(function):
    """An operator between two objects of the program, or two of one class."""

    def method(self, other):
        own = OBJECT.__get__(self)
        if type(other) is Foreign:
            other = OBJECT.__get__(other)
        elif type(other) is not type(own):
            return NotImplemented
        return for_tests(function(own, other))

    return method


for name, function in FORWARDED.items():
    setattr(Foreign, name, forwarded(function))
for name in OPERATORS:
    setattr(Foreign, f"__{name}__", between(getattr(operator, f"__{name}__")))


def caught(kinds):
    """The classes of an except clause. One of the program is left out if it also stands for the
    AssertionError of a test that failed."""
    if isinstance(kinds, tuple):
        return tuple(map(caught, kinds))
    if type(kinds) is not Foreign:
        return kinds
    kind = OBJECT.__get__(kinds)
    return () if any(kind is base for base in AssertionError.__mro__) else kind


# ---------------------------------------------------------------------------------- the run


def run_tests():
    """Run the program and the tests that stdin holds. A proof of their values and of their
    end goes to the first bytes of stdout, so that it can be guessed only once."""
    program, tests, key = marshal.loads(sys.stdin.buffer.read())
    os.ftruncate(0, 0)
    os.lseek(1, 64, os.SEEK_SET)
    texts = []

    def note(value):
        texts.append(text_of(value))
        return True

    module = types.ModuleType("program")
    sys.modules["program"] = module
    NAMES.program = vars(module)
    dict.update(NAMES, {NOTE: note, CAUGHT: caught})
    exec(program, vars(module))
    exec(tests, NAMES)
    os.pwrite(1, proof_of(key, texts), 0)


if __name__ == "__main__":
    run_tests()
