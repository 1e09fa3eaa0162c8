"""
Running generated programs: tasks/sandbox.py. Programs run with namespaces, where the system
grants them, and with limits only.
"""
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tasks import sandbox
from tasks.asserts import separate
from tasks.errors import UserError
from tasks.inside import text_of
from tasks.problems import load_problems
from tests.models import NEEDS_POSIX

pytestmark = NEEDS_POSIX  # without it no program is run
ROOT = Path(__file__).resolve().parent.parent
GOES_ON = "assert print"  # tests that a program passes if they are reached
NEEDLE = "needle-" + os.urandom(8).hex()  # no program can guess it
START = """
import builtins, ctypes, gc, io, mmap, os, re, resource, signal, socket, sys, threading, time, types
f = lambda x: x
def attempt(function, *arguments):
 try: return function(*arguments)
 except (OSError, MemoryError): return b""
def frames():
 frame = sys._getframe(1)
 while frame := frame.f_back: yield frame
"""
RIGHT = "f = lambda x: 2 * x\n"
JUMP = """
def jump(frame, event, _):
 for line in range(9, frame.f_lineno, -1):
  try:
   frame.f_lineno = line
   break
  except ValueError: pass
 return jump
"""
PRINT_ALL = """
def f(x):
 for frame in frames():
  print(frame.f_locals, frame.f_globals, frame.f_code.co_consts, gc.get_referents(frame))
 main = sys.modules["__main__"]
 print(gc.get_objects(), vars(main), sys.stdin.buffer.peek(), sys.argv, os.environ, flush=True)
 os._exit(0)
"""
HOSTILE = {  # name: a program that, after START, must not pass `assert f(1) == 2`
    "hangs": "while True: pass",
    "hangs in C": "time.sleep(99)",
    "hangs in its function": "def f(x):\n while True: pass",
    "leaves": "sys.exit(0)",
    "leaves in its function": "def f(x): raise SystemExit",
    "leaves at once": "os._exit(0)",
    "leaves at once in its function": "f = lambda x: os._exit(0)",
    "leaves from a thread": "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "leaves through atexit": "import atexit; atexit.register(os._exit, 0)",
    "leaves through excepthook": "sys.excepthook = lambda *_: os._exit(0)",
    "becomes true": "os.execv('/bin/true', ['true'])",
    "interrupts": "def f(x): raise KeyboardInterrupt",
    "kills itself": "os.kill(os.getpid(), 9); 1 / 0",
    "stops itself": "os.kill(os.getpid(), 19); time.sleep(99)",
    "kills its parent": "os.kill(os.getppid(), 9); time.sleep(99)",
    "kills its group": "os.kill(0, 9); 1 / 0",
    "ignores signals": """
for s in {*range(1, 32)} - {9, 17, 19}: signal.signal(s, signal.SIG_IGN)
while True: pass""",
    "recurses": "sys.setrecursionlimit(10**9)\nf = lambda x: f(x)",
    "prints without end": "while True: attempt(print, 'x' * 2**20)",
    "is right, but prints megabytes": RIGHT + "print('x' * 2**23)",
    "is right, but hides that it prints megabytes": RIGHT + """
while attempt(os.write, 1, bytes(2**20)): pass""",
    "is right, but takes memory": RIGHT + "x = mmap.mmap(-1, 2**33)",
    "takes all memory": "x = []\nwhile True: x.append(attempt(bytearray, 2**20))",
    "is right, but has a thread that never ends": RIGHT + """
threading.Thread(target=time.sleep, args=(99,)).start()""",
    "is right, but closes its files": RIGHT + "os.closerange(0, 64)",
    "is right, but closes stdout": RIGHT + "os.dup2(os.open('/dev/null', os.O_WRONLY), 1)",
    "redefines AssertionError": "builtins.AssertionError = lambda *_: SystemExit(0)",
    "redefines exec": """
m = sys.modules['__main__']; builtins.exec = m.exec = lambda *_: None; m.tests = ''""",
    "redefines os.write": "w = os.write; os.write = lambda fd, x: w(1, x)\nf = lambda x: 1 / 0",
    "redefines check": "check = builtins.check = lambda *_: None",
    "replaces modules": """
sys.modules.update(dict.fromkeys(['os', 'sys', 'marshal', '__main__', 'builtins']))""",
    "replaces builtins": "__builtins__ = {}",
    "prints a token": "print('0' * 32, 'passed', 'ok', '1 passed', True, sep='\\n')",
    "writes to all files": "for i in range(64): attempt(os.write, i, b'0' * 32 + b' passed ok')",
    "skips lines": JUMP + "sys.settrace(jump)",
    "looks for the key": PRINT_ALL,
    "looks for the key at once": PRINT_ALL + "f(1)",
    "is right if it finds a secret": "if 'out of reach' in str(os.environ): " + RIGHT,
}
FIND = """
found = []
def look(value):
 if isinstance(value, types.CodeType): value = value.co_consts + value.co_names
 text = value if isinstance(value, bytes) else repr(value).encode()
 found.extend(re.findall(rb"needle-[0-9a-f]+", text))
def f(x):
 search()
 return found[0].decode() if found else "nothing"
"""
HOSTILE_OF_OURS = {  # where it begins with FIND, it must not pass `assert f(1) == NEEDLE`
    "looks at its caller": FIND + """
def search():
 for frame in frames(): look(frame.f_code)""",
    "listens": FIND + "search = dict\nsys.addaudithook(lambda event, args: [*map(look, args)])",
    "traces": FIND + "search = dict\nsys.settrace(lambda frame, *_: look(frame.f_code))",
    "looks at all objects": FIND + "def search(): [*map(look, gc.get_objects())]",
    "makes a bytearray in a freed buffer": FIND + """
class Raw(io.RawIOBase):
 def readable(self): return True
 def readinto(self, buffer):
  Raw.header = buffer
  return 0
io.BufferedReader(Raw(), 56).read(1)
arrays = [bytearray() for _ in range(999)]
def search():
 header = Raw.header.cast("Q")
 texts = [f"{i:023}" for i in range(9999)]  # as long as what is looked for
 for pool in {id(text) >> 14 for text in texts}:
  header[2], header[4], header[5] = 2**14, pool << 14, pool << 14
  look(bytes(max(arrays, key=len)))""",
    "looks at its memory": FIND + """
def search():
 memory = open("/proc/self/mem", "rb", 0)
 for line in open("/proc/self/maps"):
  start, end = [int(x, 16) for x in line.split()[0].split("-")]
  if " rw" in line:
   memory.seek(start)
   look(memory.read(end - start))""",
    "reads its files again": FIND + """
def search(): [look(attempt(os.pread, fd, 10**6, 0)) for fd in range(64)]""",
    "guesses proofs": """
def f(x):
 key = [frame.f_locals["key"] for frame in frames() if "key" in frame.f_locals][0]
 for guess in 2 * ["0x2"], ["0x2"], []:
  proof = sys.modules["__main__"].proof_of(key, guess)
  os.pwrite(1, proof, 0)
  print(proof.decode(), flush=True)
 os._exit(0)""",
    "replaces what makes the proof": "sys.modules['__main__'].text_of = lambda _: 'None'",
    "closes stdin": "os.close(0); f = lambda x: input() or 2",
    "equals everything": "class E: __eq__ = lambda *_: True\nf = lambda x: E()",
    "is an int that equals everything": "class f(int): __eq__ = lambda *_: True",
    "returns an endless list": """
class f(list):
 def __init__(self, x): pass
 __iter__ = lambda self: iter(int, 1)""",
    "returns a list that holds itself": "x = []; x.append(x); f = lambda _: x",
    "leaves when deleted": "class E: __del__ = lambda _: os._exit(0)\nf = lambda x: E()",
    "leaves on a signal": """
signal.signal(14, lambda *_: os._exit(0)); signal.setitimer(0, 0.1); f = lambda x: time.sleep(9)""",
    "becomes another Python": """
f = lambda x: os.execv(sys.executable, ['python', '-c', 'print("passed")'])""",
    "empties its output": "f = lambda x: os.ftruncate(1, 0) or print(2)",
    "is right if it can raise limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); " + RIGHT,
    "is right if it can become root": "os.setuid(0)\n" + RIGHT,
}
HOSTILE_TO_NAMESPACES = {  # MARK is a folder that all may write to, PORT a socket that listens
    "leaves a daemon": """
if os.fork() == 0:
 os.setsid()
 if os.fork() == 0:
  os.closerange(0, 64)
  time.sleep(2)
  open('MARK/daemon', 'w')
 os._exit(0)""",
    "forks without end": "while True: attempt(os.fork)",
    "forks without end and leaves its group": """
while True: attempt(os.fork) or attempt(os.setsid)""",
    "leaves a child that goes on": "if os.fork(): os._exit(0)",
    "kills everything": "os.kill(-1, 9); 1 / 0",
    "kills by guessing": "for pid in range(2, 40000): attempt(os.kill, pid, 9)",
    "fills the disk": """
for i in range(10**9): attempt(lambda: open(str(i), 'wb').write(bytes(2**22)))""",
    "is right if it can write in MARK": "open('MARK/file', 'w'); " + RIGHT,
    "is right if it can write in ROOT": "open('ROOT/sandbox-file', 'w'); " + RIGHT,
    "is right if it can write to the system": "open('/usr/sandbox-file', 'w'); " + RIGHT,
    "is right if it can write to /": "open('/sandbox-file', 'w'); " + RIGHT,
    "is right if it can read the tests": "open('ROOT/tests/test_sandbox.py'); " + RIGHT,
    "is right if it sees processes": "os.listdir('/proc'); " + RIGHT,
    "is right if it can connect": "socket.create_connection(('127.0.0.1', PORT), 1); " + RIGHT,
    "is right if it can mount": """
if ctypes.CDLL(None).mount(b'x', b'/usr', b'tmpfs', 0, None) == 0: """ + RIGHT,
    "leaves a shell": """
os.system('(trap "" HUP TERM; sleep 98; touch MARK/shell) & # def run_tests(')""",
}
TASKS = [  # right, wrong, arguments and what is right for them
    ("lambda a, b: a + b", "lambda a, b: a - b", [((1, 0), 1), ((2, 3), 5)]),
    ("lambda n: 1 if n == 0 else n * f(n - 1)", "lambda n: n * f(n - 1)", [((5,), 120)]),
    ("lambda s: s.title()", "lambda s: s.capitalize()", [(("as it is",), "As It Is")]),
    ("lambda x: sum(x) / len(x)", "lambda x: sum(x) // len(x)", [(([1, 2],), 1.5)]),
    ("lambda x: {i: x.count(i) for i in x}", "lambda x: {}", [(([1, 4, 4],), {1: 1, 4: 2})]),
    ("lambda x: ({*x}, None)", "lambda x: [{*x}, None]", [(([1, 2],), ({2, 1}, None))]),
]
ALL = "[x * x for x in range(n)]"
SQUARES = [  # right programs of unusual style: f(3) == [0, 1, 4]
    "f=lambda n:[*map(lambda x:x**2,range(n))]",
    "def f(n, seen=[]):\n\tseen.append(len(seen) ** 2)\n\treturn seen if len(seen) == n else f(n)",
    "class F:\n def __call__(self, n): return ALL\nf = F()",
    "class f(list):\n def __init__(self, n): super().__init__(ALL)",
    "class F:\n @staticmethod\n def f(n): return ALL\nf = F.f",
    "class M(type):\n def __call__(c, n): return ALL\nclass f(metaclass=M): pass",
    "f = (lambda g: lambda n: g(g, n))(lambda g, n: g(g, n - 1) + [(n - 1)**2] if n else [])",
    "from functools import *\nf = lambda n: reduce(lambda a, x: a + [x * x], range(n), [])",
    "from functools import *\n@cache\ndef f(n): return f(n - 1) + [(n - 1) ** 2] if n else []",
    "from functools import *\n@singledispatch\ndef f(x): 1 / 0\n@f.register\n"
    "def _(n: int): return ALL",
    "from itertools import *\nf = lambda n: [*islice(map(int.__mul__, count(), count()), n)]",
    "from operator import mul\nf = lambda n: list(map(mul, range(n), range(n)))",
    "def g(x=0):\n while True: yield x * x; x += 1\nf = lambda n, s=g(): [next(s) for _ in ALL]",
    "def f(n):\n out = []\n while n: out[:0], n = [(n := n - 1) ** 2], n\n return out",
    "def f(n):\n try: return ALL\n finally: print('∎')",
    "def f(n):\n for n in range(1, n + 1): pass\n else: return ALL",
    "def f(n):\n match n:\n  case 0: return []\n  case _: return f(n - 1) + [(n - 1) ** 2]",
    "exec('def f(n): return ALL')",
    "f = eval('lambda n: ALL')",
    "globals()['f'] = type('F', (), {'g': lambda self, n: ALL})().g",
    "import asyncio\nasync def g(n): return ALL\nf = lambda n: asyncio.run(g(n))",
    "from fractions import Fraction as F\nf = lambda n: [F(x) ** 2 for x in range(n)]",
    "from decimal import Decimal as D\nf = lambda n: [D(x) ** 2 for x in range(n)]",
    "f = lambda n: [float(x * x) for x in range(n)]",
    "f = lambda n: [(x * 1j) ** 2 * -1 for x in range(n)]",
    "f = lambda n: [False, True, 4]",
    "import enum\nE = enum.IntEnum('E', {'a': 0, 'b': 1, 'c': 4})\nf = lambda n: list(E)",
    "import array\nf = lambda n: array.array('i', ALL).tolist()",
    "import json\nf = lambda n: json.loads(f'[0, 1, {n + 1}]')",
    "import re\nf = lambda n: [int(x) for x in re.findall('[0-9]+', '0, 1; 4')]",
    "import builtins\nprint = sorted = list = str = map = None\nf = lambda n: ALL",
    "from collections import deque\nf = lambda n: [*deque(ALL, n)]",
    "from dataclasses import *\n@dataclass\nclass A:\n x: list\nf = lambda n: A(ALL).x",
    "from contextlib import *\n@contextmanager\ndef g(n): yield ALL\n"
    "def f(n):\n with g(n) as x: return x",
    "import sys\nsys.setrecursionlimit(10**6)\nclass É: ñ = [0, 1, 4]\nf = lambda n: É.ñ",
    "import random\nrandom.seed(1)\nf = lambda n: sorted(random.sample([0, 1, 4], 3))",
    "if __name__ != '__main__':\n def f(n): return ALL",
    "import sys; f = sys.modules[__name__].f = lambda n: ALL; del sys",
]
READS = [  # and unusual ways to read all of stdin
    "open(0).read()",
    "open('/dev/stdin').read()",
    "os.read(0, os.fstat(0).st_size)",
    "os.read(0, 10**7)",
    "os.pread(0, 99, 0)",
    "b''.join(iter(lambda: os.read(0, 1), b''))",
    "mmap.mmap(0, 0, access=mmap.ACCESS_READ).read()",
    "[sys.stdin.seek(0, 2), sys.stdin.seek(0), sys.stdin.buffer.readline()][2]",
    "''.join(__import__('fileinput').input())",
    "input()",
]


def in_three_forms(function, cases):
    pairs = [{"input": f"{given}\n", "output": f"{wanted}\n"} for given, wanted in cases]
    asserts = [f"assert f(*{given}) == {wanted!r}" for given, wanted in cases]
    check = "\n    ".join(["def check(f):", *asserts])
    return [
        (f"f = {function}\nprint(f(*eval(input())))", pairs),
        (f"f = {function}", "\n".join(asserts)),
        (f"g = {function.replace('f(', 'g(')}", f"{check}\ncheck(g)\n"),
    ]


def printed(wanted, given=""):
    return [{"input": given, "output": wanted}]


def sandboxed():
    """Processes of a sandbox on this Linux: their command lines tell, also after a fork."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if re.search(rb"def guard\(|def run_tests\(", path.read_bytes()):
                found.add(path.parent)
    return found


def assert_no_sandbox_is_left():
    left, deadline = sandboxed(), time.time() + 9
    while left and time.time() < deadline:  # those of another run will end
        time.sleep(0.1)
        left &= sandboxed()
    assert not left


@pytest.fixture(params=["namespaces", "limits"])
def confined(request, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if os.getuid() == 0:  # its programs are nobody's, who should come as far as here
        for folder in [tmp_path, *tmp_path.parents][:4]:
            folder.chmod(0o755)
    if request.param == "namespaces":
        if not sandbox.has_namespaces():
            pytest.skip("this system grants no namespaces")
        return request.param
    if os.getuid() == 0:  # this Python may lie where only root may look
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
        monkeypatch.setattr(sys, "executable", python or sys.executable)
    monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
    with suppress(RuntimeError):
        if sandbox.passes("", GOES_ON):
            return request.param
    pytest.skip(f"nobody may run {sys.executable}, or it is of another version")


@pytest.mark.parametrize("response, program", [
    ("Sure:\n```python\nf = 1\n```\nDone.", "f = 1"),
    ("```py\na\n```\n```python\nb\n\nc\n```", "b\n\nc"),
    ("```\na\n```", "a"), ("f = 1", None), ("", None), ("```python\n```", ""),
    ("```python\na\n```\nOutput:\n```\n5\n```", "a"), ("```\na\n```\n```\nb\n```", "b"),
    ("```python\na\n```\n```python\nb", None), ("```python\na", None),
    ("```python\na\n```\n```bash\nls", None), ("```python\na\n```\n```bash\nls\n```", "a"),
    ("```cpp\nint a;\n```", None), ("use ```a``` or\n```python\nb\n```", "b"),
    ("1. So:\n ```python\n if a:\n  b\n ```", "if a:\n b"), ("```Python title=x\na\n```", "a"),
])
def test_the_last_complete_program_is_extracted(response, program):
    assert sandbox.extract_program(response) == program


@pytest.mark.parametrize("output, expected, same", [
    ("1 2\n3\n", "1 2\n3", True), ("1  2 \n3\n\n", " 1 2\n3", True), ("1 2 3", "1 2\n3", False),
    ("1.50", "1.5", True), ("1e2", "100", True), ("+1.", "1", True), ("", "0", False),
    ("YES", "yes", False), ("1", "1 1", False), ("nan", "nan", True), ("sNaN", "1", False),
    ("", "\n", True), ("0.1", "0.10000001", False), ("a\r\nb", "a\nb", True),
    ("1\n2", "1\n3", False), ("1\n2", "1", False), ("1_000", "1000", False),
    ("NaN", "nan", False), ("Infinity", "inf", False), ("１", "1", False), ("٣", "3", False),
    ("1" * 10**6 + "x", "1", False), ("1e999999999999999999999", "1", False),
])
def test_output_is_compared_by_tokens_and_numbers_by_value(output, expected, same):
    assert sandbox.same_output(output, expected) is same


def test_texts_are_equal_where_values_are():
    scalars = [None, False, True, 0, 1, 2, 2**70, 1.0, 1.5, -0.0, 2.0**70, 1e999, 1j, 1 + 0j]
    scalars += [complex(-0.0, 1), "", "1", "None", "a'\ud800", "[1]"]
    values = scalars + [[], (), set(), {}, {1, 2}, {2, 1}, {1: 2, 3: 4}, {3: 4, 1: 2}]
    for x in scalars:
        values += [[x], (x,), {x}, frozenset([x]), {x: 1}, {1: x}, [x, 1], [1, x], ((x,), 1)]
    for one, other in itertools.product(values, repeat=2):
        assert (text_of(one) == text_of(other)) == (one == other)


@pytest.mark.parametrize("tests, count", [
    ("assert f(1) == 2, 'message'\nx = 3\nassert g() == [(1.5, {'a': {2}})]", 2),
    ("def check(c):\n assert c(1) == 2\n assert c(2) == 3\ncheck(f)\nassert f(1) == -1", 3),
    ("assert f(1) == g(2)", 0), ("assert f(1) == b'bytes'", 0), ("assert f(1) != 2", 0),
    ("assert 1 < f(1) == 2", 0), ("for x in 1, 2:\n assert f(x) == 2", 0),
    ("if f:\n assert f(1) == 2", 0), ("try:\n assert f(1) == 2\nfinally: pass", 0),
    ("def check(c):\n assert c(1) == 2", 0),
    ("def check(c):\n if not c: return\n assert c(1) == 2\ncheck(f)", 0),
    ("def check(c):\n assert c(1) == 2\ncheck(f)\ncheck(g)", 0),
    ("@skip\ndef check(c):\n assert c(1) == 2\ncheck(f)", 0),
])
def test_only_literals_of_asserts_that_run_exactly_once_are_taken_out(tests, count):
    assert len(separate(f"{tests}\nassert f")[1]) == count


def test_right_programs_pass_and_wrong_ones_do_not(confined):
    right = [(text.replace("ALL", ALL), "assert f(3) == [0, 1, 4]") for text in SQUARES]
    for text in READS:
        right.append((START + f"print(sum(map(int, {text}.split())))", printed("5", "2 3\n")))
    assert len(right) == 48
    wrong = [
        ("import sys; print(2); sys.exit(1)", printed("2")),
        ("print(1)", printed("1") + printed("2")),
        ("", "def check(f): pass\ncheck(f)"),
        ("def", GOES_ON), (None, GOES_ON), ("\0", GOES_ON), ("#" * 10**6, GOES_ON),
    ]
    for answer, mistake, cases in TASKS:
        right += in_three_forms(answer, cases)
        wrong += in_three_forms(mistake, cases)
    right += [
        ("""import sys; sys.setrecursionlimit(10**6)
f = lambda n: n and 1 + f(n - 1)""", "assert f(5000) == 5000"),
        ("f = lambda x: print('x' * 10**6) or x", "assert f(1) == 1"),
        ("f = abs\nif __name__ == '__main__': f(int(input()))", "assert f(1) == 1"),
        ("""from __future__ import annotations
from dataclasses import dataclass
@dataclass
class A: a: int""", "class B(A): pass\nassert A(1) == A(1) != B(1)"),
        ("f = lambda: 'é∑\\ud800'", "assert f() == 'é∑\\ud800'"),
        ("print(input() + '∑')", printed("é∑", "é")),
        ("open('a', 'w').write('1')", "assert open('a').read() == '1'"),
        ("import os", "assert os.pread(0, 9, 0) == b''"),  # the tests were there
        ("import sys; print(len(sys.stdin.read()))", printed("9" * 7, "x" * 9999999)),
        ("'\ud800'; print(1)", printed("1", "x" * 10**6)),
        ("f = lambda: list(range(10**4))", f"assert f() == {list(range(10**4))}"),
        ("import random as r", "r.seed(1)\nx = r.random()\nr.seed(1)\nassert r.random() == x"),
    ]
    if confined == "namespaces":
        right += [
            ("""from multiprocessing.pool import ThreadPool
f = lambda x: ThreadPool(4).map(abs, x)""", "assert f([-1]) == [1]"),
            ("""from multiprocessing import Pool
f = lambda x: Pool(2).map(abs, x)""", "assert f([-1, 1]) == [1, 1]"),
            ("""import os, time; i = 1
try:
 while os.fork() or time.sleep(99): i += 1
except OSError: print(i)""", printed("16")),
            (START + """i = 0
while attempt(lambda: open(str(i), 'wb').write(bytes(2**22))): i += 4
print(i, 'MiB')""", printed("64 MiB")),
        ]
    else:
        wrong.append(("import os\nif os.fork() == 0: os._exit(0)", GOES_ON))
    verdicts = sandbox.grade(right + wrong, seconds=20)
    assert not [job for job, passed in zip(right, verdicts, strict=False) if not passed]
    assert not any(verdicts[len(right):])


def test_no_hostile_program_passes_or_leaves_anything(confined, tmp_path, monkeypatch):
    mark = tmp_path.parent / f"{tmp_path.name}-mark"
    mark.mkdir()
    mark.chmod(0o777)
    monkeypatch.setenv("SECRET", "out of reach")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    watched = [ROOT, Path.cwd(), Path.home()]
    before = dict(os.environ), [set(folder.glob("sandbox-*")) for folder in watched]

    programs = HOSTILE | HOSTILE_OF_OURS
    if confined == "namespaces":  # these first, so that the daemon has time to write
        programs = HOSTILE_TO_NAMESPACES | programs
    names = {"MARK": str(mark), "ROOT": str(ROOT), "PORT": str(listener.getsockname()[1])}
    tests = "def check(f):\n assert f(1) == WANTED, WANTED\ncheck(f)\nassert f(1) == WANTED\nf\n"
    jobs = []
    for program in programs.values():
        wanted = repr(NEEDLE) if program.startswith(FIND) else "2"
        program = re.sub("MARK|ROOT|PORT", lambda name: names[name[0]], program)
        jobs.append((START + program, tests.replace("WANTED", wanted)))
    begun = time.time()
    verdicts = sandbox.grade(jobs, workers=6, seconds=1)
    assert not [name for name, passed in zip(programs, verdicts, strict=True) if passed]

    if confined == "namespaces":
        time.sleep(max(0, begun + 4 - time.time()))  # the daemon writes after two seconds
    assert_no_sandbox_is_left()
    assert not list(mark.iterdir()) and not list(tmp_path.iterdir())
    assert before == (dict(os.environ), [set(folder.glob("sandbox-*")) for folder in watched])
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


CHEAT = """
class E:
 __init__ = lambda *_: None
 def true(self, *_): return True
 def same(self, *_): return self
 __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __exit__ = true
 __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = same
 __and__ = __rand__ = __neg__ = __pow__ = __rpow__ = __getitem__ = __call__ = __enter__ = same
 __getattr__ = same
 __ne__ = lambda *_: False
 __abs__ = __round__ = __int__ = __index__ = __float__ = lambda *_: 0
 __hash__ = lambda _: hash(5)
 __iter__ = lambda self: iter([self] * 3)
 __len__ = lambda _: 3
 __str__ = lambda _: S()
class S(str): __eq__ = __contains__ = lambda *_: True
"""
CHEATS = {  # name: programs whose f(3) equals everything, in some way
    "an object": "f = E",
    "a string": "f = lambda _: S()",
    "an int": """
class f(int, E): __eq__ = __sub__ = __rsub__ = __abs__ = __hash__ = lambda *_: 0 == 0""",
    "a list": "f = lambda _: [E(), E(), E()]",
    "an exception": "class f(E, Exception): pass",
    "Python's own": "from unittest.mock import ANY; f = lambda _: ANY",
    "a class that says that it is int": """
class M(type):
 __eq__ = lambda *_: True
 __hash__ = lambda _: hash(int)
class f(E, metaclass=M): pass""",
    "an array": "import numpy; f = lambda _: numpy.array(E())",
    "what it was given": """
def f(x):
 if isinstance(x, list): x[:] = E(), E()
 return E()""",
}
FORMS = {  # {f(3) of an honest program: tests in which no literal can be taken out}
    "5": """
assert f(3) == 2 + 3
assert f(3) in [5, 6]
assert f(3) in {5, 6}
assert not f(3) != 5
assert 4 < f(3) < 6
assert 5 == f(3) == 5
assert f(3) == 5 or f(3) == 6
if f(3) != 5: raise ValueError
def is_equal(a, b): return a == b;;assert is_equal(f(3), 5)
for i in [3]: assert f(i) == i + 2
for x, y in zip([f(3)], [5]): assert x == y
try: assert f(3) == 5;;finally: pass
try: assert f(3) == 5;;except f: pass
match f(3):;; case 5: pass;; case _: raise ValueError
assert abs(f(3) - 5) < 1e-6
import math;;assert math.isclose(f(3), 5)
import numpy;;assert numpy.allclose(f(3), 5)
assert [5].count(f(3)) == int("1")
assert {5: "a"}[f(3)] in "a"
assert [f(3)] == [2 + 3]
assert max(f(3), 4) == 2 + 3
assert f"{f(3)}" == str(5)
assert str(5) == str(f(3))
assert f(f(3)) == 2 + 3
assert any(x == 5 for x in [f(3)])
assert not {5} - {f(3)}
import unittest;;unittest.TestCase().assertEqual(5, f(3))
import unittest;;unittest.TestCase().assertIn(f(3), [5])""",
    "[1, 2, 4]": """
assert 4 in f(3)
assert sum(f(3)) == 3 + 4
assert bytes(f(3)) == b"\\x01\\x02\\x04"
assert sorted(f(3)) == [2 - 1, 2, 4]
for x, y in zip(f(3), [1, 2, 4]): assert x == y
x = f(3);;assert [1, 2, 4] == list(x) and x[-1] + 1 == 5""",
    "x.sort() if type(x) is list else x": "x = [2, 1];;f(x);;assert [1, 2] == sorted(x) == x",
    "A(5)": "assert f(3).value == 2 + 3;;with f(3) as x: assert x == 5",
}
HONEST = """
class A:
 def __init__(self, value): self.value = value
 def __enter__(self): return self.value
 def __exit__(self, *_): return True
"""


def test_what_equals_everything_equals_nothing():
    """Guards against tests that ask the program's own objects whether they are right."""
    honest, cheats = [], []
    for value, forms in FORMS.items():
        for form in forms.strip().split("\n"):
            tests = form.replace(";;", "\n")
            honest.append((f"{HONEST}f = lambda x: {value}", tests))
            cheats.append((CHEAT + CHEATS["an object"], tests))
    for program in CHEATS.values():
        for tests in "assert f(3) == 2 + 3", "assert 5 == f(3) == 5", cheats[-2][1]:
            cheats.append((CHEAT + program, tests))
    verdicts = sandbox.grade(honest + cheats)
    assert not [job for job, passed in zip(honest, verdicts, strict=False) if not passed]
    assert not [job for job, passed in zip(cheats, verdicts[len(honest):]) if passed]


OBJECTS = """
import asyncio, collections, dataclasses, enum, functools, math
class Full(Exception): pass
class Stack:
 def __init__(self, items=()): self.items = list(items)
 def __len__(self): return len(self.items)
 def push(self, x):
  if len(self) > 2: raise Full(x)
  self.items.append(x)
  return self
@dataclasses.dataclass(order=True)
class Point:
 x: int
 y: int = 0
 def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
class Colour(enum.Enum): RED = 1
Pair = collections.namedtuple("Pair", "a b")
def count(n):
 while True: n += yield n
def swap(pair):
 pair[0], pair[1] = pair[1], pair[0]
 return pair
def trace(function):
 @functools.wraps(function)
 def traced(*args, **named): return [function(*args, **named)]
 return traced
async def later(x): return x
def root(x): return math.sqrt(x)
"""


ON_OBJECTS = [
    "s = Stack([1]).push(2)\nassert len(s) == s.items[-1] and isinstance(s, Stack) and s",
    "s = Stack()\ns.items = [1]\nassert s.items == Stack([1]).items and s is s.push(2)",
    "try: Stack('abc').push(4)\nexcept Full as e: assert e.args == (4,)\nelse: assert Full == 0",
    "import unittest\nwith unittest.TestCase().assertRaises(Full): Stack('abc').push(4)",
    "assert Point(1) == Point(1, 0) < Point(2) != Point(1) and Point(1) != 1",
    "assert Point(1) + Point(1, 3) == Point(2, 3) and {Point: 1}[Point] == 1",
    "class Near(Point): near = True\nassert Near(1).near and issubclass(Near, Point)",
    "import copy\na = Point(1)\nb = copy.deepcopy(a)\nb.x = 4\nassert a.x == 1 != b.x",
    "assert Colour.RED is Colour(1) and Colour.RED.name == 'RE' + 'D'",
    "assert Pair(1, [2]).b == [1 + 1] and [*Pair(1, 2)._fields] == ['a', 'b']",
    "c = count(1)\nassert next(c) == 1 + 0 and c.send(4) == 5",
    "assert [x for _, x in zip('a', count(1))] == [2 - 1]",
    "a = [[1, 2]]\nassert swap(a[0]) is a[0] and a == [[2, 2 - 1]]",
    "a = [[1], [2]]\none, two = a\nswap(a)\nassert a[0] is two and a[1] is one",
    "a = {0: 1, 1: 2}\nswap(a)\nassert a[0] == 1 + 1",
    "@trace\ndef g(x): return x + 1\nassert g(1) == [1 + 1] and g.__name__ == 'g'",
    "class Own: pass\na = Own()\nassert trace(lambda x: x)(a)[0] is a",
    "import asyncio\nassert asyncio.run(later(2)) == 1 + 1",
    "assert [*map(root, [1, 4])] == [1, 1 + 1] and root.__doc__ is None and math.pi > 3",
    "import numpy\nassert (root(numpy.float64(4)) == 2) & numpy.all(trace(numpy.arange)(2)[0] < 2)",
    "def g(x: int | Unknown = Pair) -> Nothing: return x\nassert g(2) == 1 + 1",
    "n = [0]\ndef inner(x):\n n[0] += x\n return x\ntrace(inner)(2)\nassert n == [1 + 1]",
]


def test_tests_may_work_with_objects_of_the_program():
    verdicts = sandbox.grade([(OBJECTS, tests) for tests in ON_OBJECTS])
    assert not [tests for tests, passed in zip(ON_OBJECTS, verdicts) if not passed]


NOTHING_FAILS = {
    "a unittest": """
import unittest
class TestF(unittest.TestCase):
 def setUp(self): self.three = 3
 def test_f(self): self.assertEqual(f(self.three), 5)""",
    "a unittest and its main": """
from unittest import TestCase, main
class TestF(TestCase):
 def test_f(self): self.assertEqual(f(3), 5)
if __name__ == "__main__": main()""",
    "pytest": """
import pytest
@pytest.mark.parametrize("x, y", [(3, 5)])
def test_f(x, y): assert f(x) == y
def helper(): return f(3)
async def test_g(): assert helper()""",
    "an import": "import math\nfrom sys import path",
    "a comment": "# assert f(3) == 5",
    "a docstring": '"assert f(3) == 5"',
    "a constant": "assert 1 == 1",
    "pass": "x = 5\npass",
    "a print": "print('all tests passed')",
    "a try": "def g():\n assert f(3) == 5\ntry: g()\nexcept Exception as e: print('no', e)",
}
SOMETHING_FAILS = [
    "check(f)", "f", "exec('assert f(3) == 5')",
    "def test_f(): assert f(3) == 5\ntest_f()", "def a(): b()\ndef b(): assert f(3) == 5\na()",
    "class T:\n def test(self): assert f(3) == 5\nT().test()", "class T: assert f(3) == 5",
    "class T:\n def test(self): f(3)\nfor name in dir(T): getattr(T(), name)",
    "def run(g): g()\n@run\ndef _(): assert f(3) == 5",
    "def test_f(): assert f(3) == 5\nfor name in list(globals()): globals()[name]()",
    "try: f(3)\nexcept ValueError: pass", "try: f(3)\nexcept Exception: raise ValueError",
    "import sys\ntry: f(3)\nexcept Exception: sys.exit(1)", "assert open('a').read()",
    "ok = False\ntry: ok = f(3) == 5\nexcept: pass\nassert ok", "import os\nassert os.listdir()",
]


@pytest.mark.parametrize("name", NOTHING_FAILS)
def test_tests_in_which_nothing_can_fail_are_refused_when_they_are_loaded(name, tmp_path):
    data = tmp_path / "code.jsonl"
    data.write_text(json.dumps({"prompt": "a", "tests": NOTHING_FAILS[name]}))
    with pytest.raises(UserError, match="code.jsonl, line 1: tests .* can fail"):
        load_problems(data)


@pytest.mark.parametrize("tests", SOMETHING_FAILS)
def test_tests_in_which_something_can_fail_are_not_refused(tests):
    assert sandbox.passes(None, tests) is False


@pytest.mark.parametrize("flag, variable", [("-O", ""), ("-B", "2")])
def test_asserts_are_not_lost_when_python_optimises(flag, variable):
    """Guards against asserts that `python -O` takes out of the tests: all programs passed."""
    jobs = []
    for program in "f = lambda x: 5", "f = lambda x: 6":
        for tests in "assert f(3) == 5", "assert f(3) == 2 + 3":
            jobs.append((program, tests))
    run = subprocess.run(
        [sys.executable, flag, "-c", f"from tasks.sandbox import grade\nprint(grade({jobs}))"],
        cwd=ROOT, env=os.environ | {"PYTHONOPTIMIZE": variable}, capture_output=True, text=True,
    )
    assert run.stdout.strip() == "[True, True, False, False]", run.stderr


@pytest.mark.parametrize("program", [
    "import math; math.isclose = lambda *a, **k: True", HOSTILE["redefines exec"],
    HOSTILE_OF_OURS["guesses proofs"],
])
@pytest.mark.xfail(strict=True, reason="the docstring says that this is not defended against")
def test_tests_without_a_literal_can_be_cheated(program):
    tests = "import math\nassert f(1) == 1 + 1 or math.isclose(f(1), 2)"
    assert not sandbox.passes(START + program, tests)


def test_no_system_v_memory_escapes_the_limit_or_stays_on_the_host(confined):
    """Without namespaces it can be had, but only while the program runs."""
    program = "import ctypes; print(ctypes.CDLL(None).shmget(0, 2**22, 0o1600))"
    namespaces = confined == "namespaces"
    ended, output = sandbox.execute(program, b"", seconds=20, memory=2**30, namespaces=namespaces)
    segments = [line.split()[1] for line in open("/proc/sysvipc/shm")]
    assert ended and output.split()[0].decode() not in segments
    if namespaces and os.access("/proc/sys/kernel/shmmni", os.W_OK):
        assert int(output) == -1


@pytest.mark.parametrize("tests", [
    None, 5, "", " \n", "# nothing", "assert (", "\0", "'\ud800'", "return", [], {}, [5], [{}],
    [{"input": "1"}], [{"input": 1, "output": "1"}], [{"input": "\ud800", "output": ""}],
], ids=repr)
def test_malformed_tests_are_one_clear_error_and_not_a_verdict(tests):
    for program in "f = 1", None:
        with pytest.raises(ValueError, match="^tests "):
            sandbox.passes(program, tests)


def test_the_guard_ends_a_program_when_its_time_is_up(confined, monkeypatch):
    monkeypatch.setattr(sandbox.subprocess.Popen, "kill", None)  # what ends a guard that doesn't
    assert not sandbox.passes("import time; time.sleep(99)", GOES_ON, seconds=0.5)


def test_programs_are_graded_at_the_same_time_and_in_order(monkeypatch):
    meeting = threading.Barrier(4, timeout=60)
    monkeypatch.setattr(sandbox, "passes", lambda program, tests: meeting.wait() < 4 and program)
    assert sandbox.grade([(i, GOES_ON) for i in range(8)], workers=4) == list(range(8))


def test_ctrl_c_leaves_nothing_of_the_sandbox(confined, monkeypatch):
    begun, execute = [], sandbox.execute
    monkeypatch.setattr(sandbox, "execute", lambda *a, **k: begun.append(a) or execute(*a, **k))

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    hang = "while True: pass", GOES_ON
    try:
        many = partial(sandbox.grade, [hang] * 99, seconds=1)
        for run in partial(sandbox.passes, *hang, 60), many:
            signal.setitimer(signal.ITIMER_REAL, 0.7)
            with pytest.raises(KeyboardInterrupt):
                run()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert len(begun) < 99  # grade waits for what has begun, and only that
    assert_no_sandbox_is_left()


def test_a_sandbox_that_can_not_be_set_up_is_an_error_and_not_a_wrong_program(monkeypatch, capsys):
    def execute(code, stdin, seconds, memory, namespaces):
        if namespaces or broken:
            raise RuntimeError("not permitted")
        return True, b"7\n"

    sandbox.has_namespaces()  # as it is here, before this test breaks it
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "execute", execute)
        broken = False
        assert sandbox.has_namespaces.__wrapped__() is False
        assert "no namespaces" in capsys.readouterr().err
        broken = True
        with pytest.raises(UserError, match="not permitted"):
            sandbox.has_namespaces.__wrapped__()
    monkeypatch.setattr(sandbox, "CONFINE", "raise OSError('not permitted')")
    with pytest.raises(RuntimeError, match="not permitted"):
        sandbox.passes("f = 1", "assert f == 1")


WINDOWS = """
import os, sys
sys.modules.update(dict.fromkeys(["resource", "fcntl", "pwd", "grp", "termios"]))
for name in "fork getuid geteuid getgid setuid killpg sched_getaffinity fchmod".split():
    delattr(os, name)
from tasks import problems
from tasks.errors import UserError
from tasks.sandbox import grade, passes
assert passes(None, "assert f == 1") is False
for run in (lambda: grade([("f = 1", "assert f == 1")]), lambda: passes("f = 1", "assert f == 1"),
            lambda: problems.load_gradable(sys.argv[1], None, allow_code=True)):
    try:
        run()
    except UserError as error:
        print(error)
"""


def test_without_posix_all_but_running_a_program_works(tmp_path):
    """Guards against a module of one platform at the top of a file that every script imports."""
    data = tmp_path / "code.jsonl"
    data.write_text('{"prompt": "a", "tests": "assert f() == 1"}')
    run = subprocess.run(
        [sys.executable, "-c", WINDOWS, data], cwd=ROOT, capture_output=True, text=True
    )
    assert not run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and set(lines) == {lines[0]} and "needs Linux or macOS" in lines[0]
