"""
Grade generated programs: take the program out of a response, run it with its tests where it can do little harm, say whether it passes.

    extract_program("Sure:\\n```python\\ndef f(x): return 2 * x\\n```")          # "def f(x): return 2 * x"
    passes("def f(x): return 2 * x", "assert f(2) == 4")                       # True
    passes("print(2 * int(input()))", [{"input": "2", "output": "4"}])         # True
    grade([(program, problem["tests"]), ...], desc="grade")                    # [True, ...], as many at a time as there are cores

This executes what a model wrote. eval.py calls it only after --allow-code-execution.

On Linux (5.12 or later) a program gets namespaces of its own. It sees Python, the system's libraries, both read-only, and an empty
folder in memory of 64 MiB; no other file, no network, no process but its own, and when it ends or its time is up the kernel ends those.
It runs as the user, with no way to become another; root's programs run as nobody. Limits hold for each process: CPU time, memory, 4 MiB
a file, 64 open files; and for all together: 16 processes and threads. These can hold 16 times the memory of one; if the machine runs
out of it, they are the first to be killed. Where the system grants no namespaces (most containers, macOS), a note says so and only the
limits are left: then a program can start no process and, on Linux, no thread, but it reaches the network and does to files and
processes what the user may (root's programs: what nobody may), and it can fill the disk while its time lasts.

Tests in Python run in the program's own interpreter, as in the benchmarks' harnesses, and prove that they ran to their end by a key
that no name or frame leads to. Leaving early with any status, printing, tracing lines or closing files does not pass. What does: values
that lie (an object that equals everything, a len of its own), and a program written against this file (it reloads sys and traces, swaps
the tests' names from a thread, reads memory through ctypes). Tests by input and output have no such holes: the expected output never
enters the program's process. Nothing here helps against a flaw of the kernel.
"""
import functools
import inspect
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

from tqdm import tqdm


def extract_program(response):
    """The last complete block of a response that begins with ```python or ```py, else the last one with a bare ```, else None. A fence
    that never closes is a truncated response, and so no program: an earlier block does not count."""
    tagged = bare = opened = None
    for line in response.split("\n"):
        fence = re.fullmatch(r"(\s*)```+\s*([^\s`]*)[^`]*", line)
        if opened is None and fence:
            opened, lines, indent = fence[2].lower(), [], fence[1]
        elif fence and not fence[2]:
            program = "\n".join(lines)
            program = textwrap.dedent(program) if indent else program  # in a list, fence and program are indented alike
            if opened in ("python", "python3", "py"):
                tagged = program
            elif not opened:
                bare = program
            opened = None
        elif opened is not None:
            lines.append(line)
    return None if opened is not None else bare if tagged is None else tagged


def confine():
    """The guard: `python -c SOURCE CODE SECONDS MEMORY NAMESPACES` runs CODE in a confined Python, ends it when its time is up, and exits
    with 0 if that did. It runs in an interpreter of its own, from its source alone. What it writes to stderr is its own failure."""
    import ctypes
    import os
    import resource
    import signal
    import sys

    code, seconds, memory, namespaces = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
    libc, linux, root, nobody, folder = ctypes.CDLL(None, use_errno=True), sys.platform == "linux", os.getuid() == 0, 65534, os.getcwd()

    def call(function, *arguments):
        as_c = [ctypes.c_ulong(a) if isinstance(a, int) else os.fsencode(a) if isinstance(a, str) else a for a in arguments]
        if libc[function](*as_c) < 0:
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {function}{arguments}")

    def write(path, text=""):
        with open(path, "w") as f:
            f.write(text)

    os.umask(0o022)
    if linux:
        write("/proc/self/oom_score_adj", "1000")
    if namespaces:
        NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
        NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18
        if not root:  # a user namespace gives the right to the others; exec will take it
            ids = os.getuid(), os.getgid()
            call("unshare", NEWUSER)
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{ids[0]} {ids[0]} 1")
            write("/proc/self/gid_map", f"{ids[1]} {ids[1]} 1")
        call("unshare", NEWNS | NEWPID | NEWNET | NEWIPC)  # the child will be process 1, with which all others end
        call("mount", None, "/", None, REC | PRIVATE, None)  # what is mounted from here on is not seen outside
        call("mount", "tmpfs", folder, "tmpfs", NOSUID | NODEV, "mode=755")
        prefixes = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))}
        python = {os.path.join(prefix, name) for prefix in prefixes for name in os.listdir(prefix)}  # one may itself be closed to nobody
        system = {"/usr", "/bin", "/lib", "/lib64", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"}
        for path in sorted(python | system | {"/dev/null", "/dev/zero", "/dev/urandom"}):  # a folder before what is in it
            if os.path.exists(path) and not os.path.exists(folder + path):
                if os.path.isdir(path):
                    os.makedirs(folder + path)
                else:
                    os.makedirs(os.path.dirname(folder + path), exist_ok=True)
                    write(folder + path)
                call("mount", path, folder + path, None, BIND | REC, None)
        os.makedirs(folder + "/dev/shm")
        call("syscall", 442, -1, folder, 0x8000, (ctypes.c_uint64 * 4)(1 | NOSUID), 32)  # mount_setattr: all of it is read-only
        call("mount", "tmpfs", folder + "/dev/shm", "tmpfs", NOSUID | NODEV, "mode=777,size=64m,nr_inodes=4096")
        os.chdir(folder)
        call("pivot_root", ".", ".")
        call("umount2", ".", 2)  # MNT_DETACH: the old root, which lay below the new one
        folder = "/dev/shm"
        os.chdir(folder)
    elif root:
        os.chown(folder, nobody, nobody)

    child = 0  # until there is one, a signal ends the guard itself
    for number in signal.SIGALRM, signal.SIGTERM:
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.dup(2), "w")  # takes errors up to the exec, and is closed by it
        os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
        if root:
            os.setgroups([])
            os.setgid(nobody)
            os.setuid(nobody)
        if namespaces:
            os.setsid()  # in the guard's group it could signal the guard
            if root:
                call("unshare", NEWUSER)  # in which its processes are counted apart from other programs'
        if linux:
            call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: this is sent when the guard dies
            call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no sudo
        limits = {"CPU": int(seconds) + 1, "FSIZE": 2**22, "NOFILE": 64, "CORE": 0, "NPROC": 16 if namespaces else 1, "AS": memory}
        for name, value in limits.items():
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            value = value if hard < 0 else min(value, hard)  # -1 is no limit
            if linux or name != "AS":  # macOS has it and refuses it
                resource.setrlimit(limit, (value, value))
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
                       "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            os.execve(sys.executable, [sys.executable, "-c", code], environment)
        except PermissionError:
            sys.exit(f"this user (nobody, for root) can't run {sys.executable}: put Python where all users can read it, or do not be root")
    if linux:
        call("prctl", 1, signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os._exit(os.waitpid(child, 0)[1] != 0)


GUARD = inspect.getsource(confine) + "confine()"

# What a program with Python tests runs in. The last line's os.write, key, exec and tests are on the interpreter's stack before the program
# begins, where no name, frame or container leads to them; exec returns None. A trace function could make a failing test's line be skipped.
RUN_TESTS = """
import gc, marshal, os, sys
names = sys.modules.setdefault("program", type(sys)("program")).__dict__
program, tests, *key = marshal.load(sys.stdin.buffer)
gc.get_objects = gc.get_referents = gc.get_referrers = sys.settrace = sys.setprofile = lambda *_: []
os.write(1, key.pop()[exec(*(tests, names)[exec(program, names) or 0:]) or 0:])
"""


def execute(code, stdin, seconds, memory, namespaces):
    """Run Python code with bytes on its stdin: (it exited with 0, bytes of its stdout). Raises RuntimeError if it can't be confined."""
    command = [sys.executable, "-I", "-c", GUARD, code, str(seconds), str(memory), str(namespaces)]
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, tempfile.TemporaryFile() as output:  # a file, so that FSIZE caps it
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, cwd=folder, env={},
                                 start_new_session=True)
        try:
            errors = guard.communicate(stdin, seconds + 10)[1].decode(errors="replace").strip()  # ends when the guard's stderr closes
        except subprocess.TimeoutExpired:  # without namespaces a program can stop its guard
            errors = ""
            os.killpg(guard.pid, signal.SIGKILL)
        finally:
            guard.terminate()  # where a Ctrl-C came first
            guard.wait()
        if guard.returncode < 0:  # or kill it
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(guard.pid, signal.SIGKILL)
        if errors:
            raise RuntimeError(errors.splitlines()[-1])
        output.seek(0)
        return guard.returncode == 0, output.read()


@functools.cache
def has_namespaces():
    """Are programs granted namespaces here? Tried once; where not, a note on stderr says why. Raises RuntimeError if nothing can be run."""
    reason = f"{sys.platform} has none"
    for namespaces in (True, False) if sys.platform == "linux" else (False,):
        try:
            if execute("print(7)", b"", 10, 2**30, namespaces) == (True, b"7\n"):
                if not namespaces:
                    print(f"sandbox.py: no namespaces, only limits ({reason}): programs can start no processes, but reach the network "
                          "and what the user may", file=sys.stderr)
                return namespaces
            reason = f"{sys.executable} fails there"
        except RuntimeError as error:
            reason = error
    raise RuntimeError(f"sandbox.py can't run programs here: {reason}")


def same_output(output, expected):
    """The same lines of the same tokens, numbers by value (1.50 is 1.5), as LiveCodeBench compares; other white space does not count."""
    def same(a, b):
        try:
            return a == b or Decimal(a) == Decimal(b)
        except ArithmeticError:  # not numbers
            return False

    a, b = ([line.split() for line in text.strip().split("\n")] for text in (output, expected))
    return len(a) == len(b) and all(len(x) == len(y) and all(map(same, x, y)) for x, y in zip(a, b))


def passes(program, tests, entry_point=None, seconds=6, memory=2**30):
    """Does a program (str, or None: it does not) pass all of its tests?

    `tests` is Python source, executed after the program among its names and, if there is an entry point, followed by `check(entry_point)`;
    or a list of {"input": str, "output": str}, each for a run of its own, which must exit with 0. `seconds`: of wall time, and of CPU time,
    for a run. `memory`: bytes of address space for a process. Output over 4 MiB fails. Raises RuntimeError where no program can be run.
    """
    if not tests:
        raise ValueError(f"tests {tests!r}: any program would pass")
    if program is None or "\0" in program or len(program.encode(errors="replace")) > 100_000:  # can't be a command's argument
        return False
    run = functools.partial(execute, seconds=seconds, memory=memory, namespaces=has_namespaces())
    if isinstance(tests, str):
        key = os.urandom(16).hex().encode()
        ended, output = run(RUN_TESTS, marshal.dumps([program, tests + (f"\ncheck({entry_point})" if entry_point else ""), key]))
        return ended and key in output
    for pair in tests:
        ended, output = run(program.encode(errors="replace"), pair["input"].encode())
        if not ended or not same_output(output.decode(errors="replace"), pair["output"]):
            return False
    return True


def grade(jobs, workers=None, desc=None, **limits):
    """`passes` for many (program, tests) or (program, tests, entry_point), `workers` at a time (default: a core each). Bools, in order."""
    jobs, cores = list(jobs), len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    has_namespaces()
    pool = ThreadPoolExecutor(workers or cores)
    try:
        results = pool.map(lambda job: passes(*job, **limits), jobs)
        return list(tqdm(results, desc=desc, total=len(jobs), unit="program", leave=False, delay=5, disable=desc is None))
    finally:
        pool.shutdown(cancel_futures=True)  # after a Ctrl-C or an error: what has not begun
