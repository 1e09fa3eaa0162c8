"""
Grade generated programs: take the program out of a response, run it with its tests
where it can do little harm, and say whether it passes.

    extract_program("Sure:\\n```python\\ndef f(x): return 2 * x\\n```")
    passes("def f(x): return 2 * x", "assert f(2) == 4")                 # True
    passes("print(2 * int(input()))", [{"input": "2", "output": "4"}])   # True
    grade([(program, problem["tests"]), ...], desc="grade")              # [True, ...]

This executes what a model wrote. The scripts do it only after --allow-code-execution.

Harm. On Linux (5.12 or later) a program gets namespaces of its own. It sees Python and the
system's libraries, read-only, and an empty folder in memory of 64 MiB; no other file, no
network, no process but its own, and those end with it. It runs as the user, and root's
programs as nobody. Limits hold for a process: CPU time, memory, 4 MiB a file, 64 open
files; and for all together: 16 processes and threads, so 16 times the memory. System V
shared memory, which no limit covers, is off for root and on recent kernels.
Where the system grants no namespaces (most containers, macOS), a note says so and only the
limits are left. Then a program can start no process and, on Linux, no thread; but it
reaches the network, does to files and processes what the user may (root's: what nobody
may), and can fill the disk and System V shared memory, which is emptied at its end.

Cheating. An expected output never enters the program's process, nor does the 4 of
`assert f(2) == 4`: that process sends a digest of the text of f(2), and here it is compared
with the one of 4. So whatever a program reads or replaces there, it has to know the 4. This
holds for literals in asserts that run exactly once (tasks/asserts.py).
Other tests, such as `math.isclose(f(2), 4)`, are decided in the program's interpreter, as in
the benchmarks' harnesses, but on copies that know only Python's own types (tasks/inside.py):
an object that equals everything equals nothing that the tests have. Asserts count however
Python was started, and tests in which nothing can fail are refused.
Not prevented is what only a program that is written to cheat does: it replaces math.isclose or
a helper of the setup, reads or traces the tests, or finds the key that proves their end. These
are not copied: what it passes to a function or an object of the tests, what its exceptions hold,
and what a class of the tests inherits from one of its own.
The cost: an object that is no number, string, list, tuple, set or dict equals no literal,
even if it says so. Objects of a program's class work with each other, not with data: no
operator, no `in` but by iterating. Its IntEnum is an int for the tests, its defaultdict a dict,
and its `with` swallows no error.
The sandbox does not protect against bugs in the kernel.
"""
import functools
import marshal
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

from tqdm import tqdm

from tasks.asserts import separate
from tasks.errors import UserError
from tasks.inside import proof_of


def extract_program(response):
    """The last complete block of a response that begins with ```python or ```py, else the
    last one with a bare ```, else None. A fence that never closes is a truncated response,
    and so no program: an earlier block does not count."""
    tagged = bare = language = None
    for line in response.split("\n"):
        fence = re.fullmatch(r"(\s*)```+([^`]*)", line)
        words = fence[2].split() if fence else []
        if language is None and fence:
            language = words[0].lower() if words else ""
            indent, lines = fence[1], []
        elif fence and not words:
            program = "\n".join(lines)
            if indent:  # in a list, fence and program are indented alike
                program = textwrap.dedent(program)
            if language in ("python", "python3", "py"):
                tagged = program
            elif not language:
                bare = program
            language = None
        elif language is not None:
            lines.append(line)
    if language is not None:
        return None
    return bare if tagged is None else tagged


CONFINE, INSIDE = (
    Path(__file__).with_name(name).read_text(encoding="utf-8")
    for name in ("confine.py", "inside.py")
)


def execute(code, stdin, seconds, memory, namespaces):
    """Run Python code in a guard: (it exited with 0 and filled no 4 MiB, bytes of its stdout).

    `stdin` is bytes, put into a file: programs seek in it, and read it in one go. Raises
    RuntimeError if the code can not be confined.
    """
    arguments = [code, str(seconds), str(memory), str(namespaces)]
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        tempfile.NamedTemporaryFile(prefix="sandbox-") as given,
        tempfile.TemporaryFile() as output,  # no pipe: a file's size has a limit
    ):
        given.write(stdin)
        given.seek(0)
        os.fchmod(given.fileno(), 0o444)  # nobody, too, may open /dev/stdin
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", CONFINE] + arguments,
            stdin=given,
            stdout=output,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            errors = process.communicate(timeout=seconds + 10)[1]  # until stderr closes
        except subprocess.TimeoutExpired:  # without namespaces a program can stop its guard
            errors = b""
            process.kill()
        finally:
            process.terminate()  # where a Ctrl-C came first
            process.wait()
        if process.returncode < 0:  # or kill it
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        if errors.strip():
            raise RuntimeError(errors.decode(errors="replace").strip().splitlines()[-1])
        output.seek(0)
        printed = output.read()
        return process.returncode == 0 and len(printed) < 2**22, printed


@functools.cache
def has_namespaces():
    """Are programs granted namespaces here? This is tried once; where they are not, a note
    on stderr says why. Raises UserError if nothing can be run."""
    if not hasattr(os, "fork"):
        raise UserError(f"grading programs needs Linux or macOS, and this is {sys.platform} (on "
                        "Windows: WSL); everything else runs here")
    reason = f"{sys.platform} has none"
    for namespaces in (True, False) if sys.platform == "linux" else (False,):
        try:
            run = functools.partial(execute, seconds=10, memory=2**30, namespaces=namespaces)
            if run("print(7)", b"") == (True, b"7\n"):
                break
            reason = f"{sys.executable} fails there"
        except RuntimeError as error:
            reason = error
    else:
        raise UserError(f"sandbox.py can't run programs here: {reason}")
    if not namespaces:
        print(f"sandbox.py: no namespaces, only limits ({reason}): programs can start no "
              "processes, but reach the network and what the user may", file=sys.stderr)
    return namespaces


NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")


def same_token(token, expected):
    if NUMBER.fullmatch(token) and NUMBER.fullmatch(expected):
        return Decimal(token) == Decimal(expected)
    return token == expected


def same_output(output, expected):
    """The same lines of the same tokens, numbers by value (1.50 is 1.5), as LiveCodeBench
    compares; other white space does not count. 1_000, NaN and Infinity are no numbers."""
    lengths = [len(line.split()) for line in output.strip().split("\n")]
    if lengths != [len(line.split()) for line in expected.strip().split("\n")]:
        return False
    return all(map(same_token, output.split(), expected.split()))


def is_pair(test):
    match test:
        case {"input": str(given), "output": str()}:
            return not re.search(r"[\ud800-\udfff]", given)  # half a character
    return False


def passes(program, tests, seconds=6, memory=2**30):
    """Does a program (str, or None: it does not) pass all of its tests?

    `tests` is Python source, executed after the program among its names; or a list of
    {"input": str, "output": str}, each for a run of its own, which must exit with 0.
    `seconds`: of wall time, and of CPU time, for a run. `memory`: bytes of address space
    for a process. Output over 4 MiB fails. Raises ValueError for any other tests, and
    UserError where no program can be run.
    """
    if isinstance(tests, str):
        code, texts = separate(tests)
    elif not isinstance(tests, list) or not tests or not all(map(is_pair, tests)):
        raise ValueError(f"tests {str(tests)[:60]!r}: give Python source, or a list of "
                         '{"input": str, "output": str} that is not empty')
    if program is None or "\0" in program:
        return False
    source = program.encode(errors="replace")
    if len(source) > 100_000:  # it can't be the argument of a command
        return False
    namespaces = has_namespaces()
    run = functools.partial(execute, seconds=seconds, memory=memory, namespaces=namespaces)
    if isinstance(tests, str):
        key = os.urandom(16)
        ended, output = run(INSIDE, marshal.dumps([program, code, key]))
        return ended and output[:64] == proof_of(key, texts)
    for pair in tests:
        ended, output = run(source, pair["input"].encode())
        if not ended or not same_output(output.decode(errors="replace"), pair["output"]):
            return False
    return True


def grade(jobs, workers=None, desc=None, **limits):
    """`passes` for many (program, tests), or (program, tests, seconds, memory), `workers` at a
    time (default: one for each core). `limits`: seconds and memory, as for `passes`, of jobs
    that have none. Returns bools, in the order of `jobs`."""
    jobs = list(jobs)
    has_namespaces()
    if workers is None and sys.platform == "linux":
        workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        results = pool.map(lambda job: passes(*job, **limits), jobs)
        progress = tqdm(results, desc, len(jobs), leave=False, delay=5, disable=desc is None)
        return list(progress)
    finally:
        pool.shutdown(cancel_futures=True)  # after a Ctrl-C or an error: what has not begun
