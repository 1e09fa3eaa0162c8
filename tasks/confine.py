"""
Confine a program: the process that starts it, limits it, and ends it with its time.

tasks/sandbox.py runs this file's text in an interpreter of its own (`python -c`), and nothing
imports it: what it calls is POSIX, and the namespaces are Linux.
"""
import ctypes
import os
import signal
import sys


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
    with open(path, "w", encoding="utf-8") as file:
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
    with open("/proc/sysvipc/shm", encoding="ascii") as table:
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
        sys.stderr = open(os.dup(2), "w", encoding="utf-8")  # takes errors until exec closes it
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


if __name__ == "__main__":
    guard()
