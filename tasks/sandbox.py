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
holds for literals in asserts that run exactly once (see `separate`). The price: an object
that is no number, string, list, tuple, set or dict equals no literal, even if it says so.
Other tests, such as `math.isclose(f(2), 4)`, are decided in the program's interpreter, as
in the benchmarks' harnesses. Leaving early, printing and closing files do not pass them,
but a program that is written to cheat does: it replaces math.isclose, returns an object
that equals everything, traces the tests, or finds the key that proves their end.
Nothing here helps against a flaw of the kernel.
"""
import ast
import ctypes
import functools
import hashlib
import inspect
import marshal
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal

from tqdm import tqdm

from tasks.errors import UserError


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


# ------------------------------------------------------------------------- the guard
# The source of this part is run in an interpreter of its own, which starts the program's.


def call(function, *arguments):
    """Call a function of the C library. Raises OSError where it fails."""
    converted = []
    for argument in arguments:
        is_text = isinstance(argument, str)
        converted.append(os.fsencode(argument) if is_text else argument)
    if ctypes.CDLL(None, use_errno=True)[function](*converted) < 0:
        reason = os.strerror(ctypes.get_errno())
        raise OSError(ctypes.get_errno(), f"{reason}: {function}{arguments}")


def write(path, text=""):
    with open(path, "w") as file:
        file.write(text)


NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18


def enter_namespaces():
    """Leave the host's mounts, network, System V memory and, with the next child, processes."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:  # the root of a user namespace has the right to the others
        call("unshare", NEWUSER)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
    call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET)
    for name, nothing in ("shmmni", "0"), ("msgmni", "0"), ("sem", "0 0 0 0"):
        path = f"/proc/sys/kernel/{name}"  # of the new namespace
        if os.access(path, os.W_OK):  # older kernels let only the host's root do it
            write(path, nothing)


def bind(source, target):
    """Show a file or folder, with all that is mounted in it, at a second path."""
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(target)
    call("mount", source, target, None, BIND | RECURSIVE, None)


def enter_root(folder):
    """Make `folder` the root of all files. It holds, read-only, Python, the system and
    /dev/stdin; in /dev/shm, an empty folder in memory, all may write."""
    call("mount", None, "/", None, RECURSIVE | PRIVATE, None)  # the host sees nothing of it
    call("mount", "tmpfs", folder, "tmpfs", NOSUID | NODEV, "mode=755")
    shown = {"/usr", "/bin", "/lib", "/lib64", "/nix/store", "/dev/null", "/dev/zero"}
    shown |= {"/dev/urandom", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"}
    installed = os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))
    for prefix in sys.prefix, sys.base_prefix, installed:  # may itself be closed to nobody
        shown.update(os.path.join(prefix, name) for name in os.listdir(prefix))
    for path in sorted(shown):  # a folder before what is in it
        if os.path.exists(path) and not os.path.exists(folder + path):
            bind(path, folder + path)
    bind(os.readlink("/proc/self/fd/0"), folder + "/dev/stdin")
    os.makedirs(folder + "/dev/shm")
    read_only = (ctypes.c_uint64 * 4)(1 | NOSUID)
    call("syscall", 442, -1, folder, 0x8000, read_only, 32)  # mount_setattr, recursively
    size = "mode=777,size=64m,nr_inodes=4096"
    call("mount", "tmpfs", folder + "/dev/shm", "tmpfs", NOSUID | NODEV, size)
    os.chdir(folder)
    call("pivot_root", ".", ".")
    call("umount2", ".", 2)  # MNT_DETACH: the old root, which lay below the new one
    os.chdir("/dev/shm")


def drop_rights(root, namespaces):
    """Become nobody, if root, and nobody else from then on; end when the guard does."""
    if root:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if namespaces:
        os.setsid()  # in the guard's group it could signal the guard
        call("unshare", NEWUSER)  # in which its processes are counted apart from others
    if sys.platform == "linux":
        call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no sudo


def set_limits(seconds, memory, processes):
    import resource  # Windows has none, and imports this file

    limits = {"CPU": int(seconds) + 1, "NPROC": processes, "NOFILE": 64}
    limits |= {"FSIZE": 2**22, "CORE": 0}
    if sys.platform == "linux":  # macOS refuses it
        limits["AS"] = memory
    for name, value in limits.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))


def become_program(code):
    """Replace this process by a fresh Python that runs `code`."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": os.getcwd(), "TMPDIR": os.getcwd()}
    environment |= {"PYTHONUTF8": "1", "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    except PermissionError:
        sys.exit(f"nobody may run {sys.executable}: put Python where all may, or do not be root")


def remove_shared_memory(creator):
    """Remove the System V segments that a process made, which would outlive it."""
    with open("/proc/sysvipc/shm") as table:
        rows = table.readlines()[1:]
    for row in rows:
        fields = row.split()  # key, id, rights, bytes, creator, ...
        if int(fields[4]) == creator:
            call("shmctl", int(fields[1]), 0, None)  # IPC_RMID


def guard():
    """`python -c GUARD CODE SECONDS MEMORY NAMESPACES` runs CODE in a confined Python, ends
    it when its time is up, and exits with 0 if it did. On stderr are the guard's errors."""
    code, seconds, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    namespaces = sys.argv[4] == "True"
    root = os.getuid() == 0
    linux = sys.platform == "linux"
    os.umask(0o022)
    if linux:
        write("/proc/self/oom_score_adj", "1000")
    if namespaces:
        folder = os.getcwd()
        enter_namespaces()
        enter_root(folder)
    elif root:
        os.chown(".", 65534, 65534)
    child = 0  # until there is one, a signal ends the guard itself

    def stop(number, frame):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself, at this moment
            pass

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.dup(2), "w")  # takes errors until exec closes it
        os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
        drop_rights(root, namespaces)
        set_limits(seconds, memory, processes=16 if namespaces else 1)
        become_program(code)
    if linux:
        call("prctl", 1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = os.waitpid(child, 0)[1]
    if not namespaces and os.path.exists("/proc/sysvipc/shm"):
        remove_shared_memory(child)
    os._exit(status != 0)


# ------------------------------------------------------------------- Python tests, inside
# The source of this part is also run in the program's interpreter.

NOTE = "__note__"


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
    exec(program, vars(module))
    vars(module)[NOTE] = note
    exec(tests, vars(module))
    os.pwrite(1, proof_of(key, texts), 0)


# ----------------------------------------------------------------------------- the verdict

PARTS = inspect.getsource(sys.modules[__name__]).split("\n# -----")
GUARD = "import ctypes, os, signal, sys\n#" + PARTS[1] + "\n\nguard()"
INSIDE = "import hashlib, marshal, os, sys, types\n#" + PARTS[2] + "\n\nrun_tests()"
PARSING = threading.Lock()  # for the warnings' filters, which all threads share


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
            [sys.executable, "-I", "-c", GUARD] + arguments,
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


def runs_once(function, tree):
    """Does a function have no return, and is it named nowhere but in the call at hand?"""
    if any(isinstance(node, ast.Return) for node in ast.walk(function)):
        return False
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return names.count(function.name) == 1


def take_out(body, tree, texts):
    """Take the literals out of asserts in `body`, statements of `tree` that all run exactly
    once, and append their texts."""
    functions = {}
    for statement in body:
        match statement:
            case ast.Assert(ast.Compare(value, [ast.Eq()], [expected])):
                with suppress(ValueError, TypeError):  # it is no literal
                    texts.append(text_of(ast.literal_eval(expected)))
                    statement.test = ast.parse(f"{NOTE}()", mode="eval").body
                    statement.test.args = [value]
                    statement.msg = None  # it may tell the literal, too
            case ast.FunctionDef(name, decorator_list=[]):
                functions[name] = statement
            case ast.Expr(ast.Call(ast.Name(name))) if name in functions:
                if runs_once(functions[name], tree):
                    take_out(functions[name].body, tree, texts)


@functools.lru_cache(maxsize=16)  # a problem has many samples
def separate(tests):
    """Take the expected values out of Python tests: (code without them, their texts).

    `assert f(2) == 4` becomes `assert __note__(f(2))`, which always holds. That is done at the
    top level, and in a function, like HumanEval's `check`, that is called there, is named
    nowhere else and has no return.
    Raises ValueError where the tests are no Python, or nothing at all.
    """
    texts = []
    try:
        with PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(tests)
            take_out(tree.body, tree, texts)
            code = compile(tree, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests {tests[:60]!r} are not Python: {error}") from None
    if not tree.body:
        raise ValueError(f"tests {tests[:60]!r} are empty: any program would pass")
    return code, texts


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
    """`passes` for many (program, tests), `workers` at a time (default: one for each core).
    `limits`: seconds and memory, as for `passes`. Returns bools, in the order of `jobs`."""
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
