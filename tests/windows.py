"""
What Windows lacks or refuses, taken away here: a script that runs behind this may run there.

    python tests/windows.py em_rl.py --steps 2 ... -- eval.py --limit 4 ...    # one after another
    for FILE in test_entropy.py tests/test_*.py; do python tests/windows.py pytest -q $FILE; done

In the second line the tests run behind this, but not what they start in processes of their own.
Gone are modules, functions and signals of POSIX. In the working directory a file that is open or
mapped into memory can't be renamed, removed or overwritten, nothing is renamed to a name that is
taken by a folder, and a name has no <>:"|?* in it. What is left out: packages that have a version
for Windows are loaded before.
"""
import importlib
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's libraries are imported

import filelock  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
import transformers
from _pytest import tmpdir

assert transformers.LlamaForCausalLM  # which imports psutil

ROOT = Path(__file__).resolve().parent.parent
MODULES = "resource fcntl pwd grp termios tty pty readline syslog".split()
FUNCTIONS = """
chown chroot confstr ctermid fchmod fchown fdatasync fork forkpty getegid geteuid getgid getgroups
getloadavg getpgid getpgrp getpriority getresgid getresuid getsid getuid killpg lchown lockf mkfifo
mknod nice openpty pathconf pread preadv pwrite sched_getaffinity sched_setaffinity sched_yield
setegid seteuid setgid setpgid setpriority setsid setuid sync sysconf ttyname uname
wait wait3 wait4 waitid
""".split()
SIGNALS = "INT TERM ABRT FPE ILL SEGV".split()


def busy(path):
    """Is a file, or one in a folder, open in this process or mapped into its memory?"""
    path = os.path.realpath(path)
    held = [line.split()[-1] for line in open("/proc/self/maps", encoding="utf-8")]
    for number in os.listdir("/proc/self/fd"):
        try:
            held.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return any(name == path or name.startswith(path + os.sep) for name in held)


def refuse(event, args):
    """An audit hook, with what Windows would say."""
    if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not isinstance(args[0], str):
        return
    here = os.getcwd() + os.sep
    paths = [os.path.abspath(path) for path in args[: 1 + (event == "os.rename")]]
    if not paths[0].startswith(here):
        return
    if event in ("open", "os.mkdir"):
        if set(paths[0].removeprefix(here)) & set('<>:"|?*'):
            raise OSError(22, "Invalid argument", paths[0])
    elif any(map(busy, paths)) or event == "os.rename" and os.path.isdir(paths[1]):
        raise PermissionError(13, "Access is denied", *paths)


def rename(old, new):
    if os.path.exists(new):
        raise FileExistsError(17, "Cannot create a file when that file already exists", old, new)
    os.replace(old, new)


def send_signal(process, number, send=subprocess.Popen.send_signal):
    if number != signal.SIGTERM:
        raise ValueError(f"Unsupported signal: {number}")
    send(process, number)


def become_windows():
    sys.modules.update(dict.fromkeys(MODULES))
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    os.rename = rename
    subprocess.Popen.send_signal = send_signal
    subprocess.Popen.kill = subprocess.Popen.terminate
    for name in [name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"]:
        if name.removeprefix("SIG") not in SIGNALS:
            delattr(signal, name)
    for name in "alarm", "setitimer", "pthread_sigmask", "pthread_kill", "sigwait", "pause":
        delattr(signal, name)
    resource_tracker._HAVE_SIGMASK = False  # of multiprocessing, which does without on Windows
    sys.addaudithook(refuse)


def run(script, flags):
    """Run a script of this repository, or pytest: what it ends with, None for a script's end."""
    print(f"--- {script}", flush=True)
    if script == "pytest":
        return int(pytest.main(flags))
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code


def main(words):
    commands = [[]]
    for word in words:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    if "pytest" in words:
        for name in "datasets", "peft", "platformdirs":
            if importlib.util.find_spec(name):
                importlib.import_module(name)
        tmpdir.get_user_id = lambda: None  # pytest's own, by os.getuid
    become_windows()
    for script, *flags in commands:
        code = run(script, flags)
        if code is not None:
            print(f"--- {script} ended with {code!r}", flush=True)


if __name__ == "__main__":  # a process that multiprocessing starts loads this file, too
    main(sys.argv[1:])
