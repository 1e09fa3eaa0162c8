"""
Files of a run that a kill, a full disk or a second process cannot spoil.
"""
import contextlib
import itertools
import json
import os
import re
import time
from pathlib import Path

import filelock

from tasks.errors import UserError

LOCKS = []  # those that this process holds

LINE = {  # the fields of a line of an evaluation's samples.jsonl that are read, by type
    str: "data decoder response", str | int: "id", int: "job place seed length",
    bool: "correct answered truncated", int | float: "entropy logprob flops seconds",
}


def lock(folder, name="lock"):
    """Lock a folder until `release_locks`, or until the process ends, however it does.

    Raises UserError where another process has it.
    """
    held = filelock.FileLock(Path(folder) / name, is_singleton=True)  # one for a process
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is writing there; wait until it ends") from None
    LOCKS.append(held)
    return held


def release_locks():
    """At the end of a script. A local variable would not do: an exception that is still known
    somewhere keeps the frames alive through which it came."""
    while LOCKS:
        LOCKS.pop().release()


def fresh_folder(stem):
    """Make a folder of its own: the stem and the time, and a number where that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for n in itertools.count(1):
        folder = Path(f"{stem}-{stamp}-{n}" if n > 1 else f"{stem}-{stamp}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


def make_folder(out, stem):
    """The folder of new results: `out`, or without it a fresh one.

    Raises UserError where it can't be made, and where it holds files: whatever it holds, no run
    of ours has made it, and some of the names might be those of our files.
    """
    if not out:
        return fresh_folder(stem)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.glob("[!.]*"))
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None
    for name in found:  # locks are empty, and .new is what a kill leaves of `replace_file`
        if not name.endswith(".new") and (folder / name).stat().st_size > 0:
            raise UserError(f"--out {out}: {name} is there already, and may be yours; give a new "
                            "or an empty folder")
    return folder


def refuse_to_replace(path, beginning):
    """UserError where there is a file that does not begin as those do that a script writes."""
    with contextlib.suppress(FileNotFoundError):
        if not path.read_bytes().startswith(beginning.encode()):
            raise UserError(f"{path} is there already, and may be yours; give another --out")


def read_jsonl(path, needs=None):
    """The objects of a JSONL file, without lines that a kill or a full disk has cut short.

    `needs` has the fields that each object must have, by type: {int: "step length"}. UserError,
    with the line, where one has not.
    """
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # blank, half written, or no JSON at all
            continue
        if not row or not isinstance(row, dict):
            continue
        for kind, keys in (needs or {}).items():
            for key in keys.split():
                value = row.get(key)
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                    found = json.dumps(value)[:40] if key in row else "missing"
                    raise UserError(f"{path}, line {number}: {key!r} is {found}, so the line is "
                                    "none of this script's; take it out, or give another folder")
        rows.append(row)
    return rows


def append_jsonl(path, rows):
    """Add rows to a JSONL file, after ending a line that was cut short before."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def replace_file(path, text):
    """Write a file beside its old version, then rename: a kill leaves the one or the other."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")  # shards may write the same file
    new.write_text(text, encoding="utf-8", newline="\n")  # on Windows, too
    replace(new, path)


def replace(new, old):
    """Rename a file or folder to the name of another file, or of none.

    Windows refuses that while any program has one of them open: a virus scanner for a moment, a
    spreadsheet for hours. So it is tried for 7 seconds, and then a PermissionError.
    """
    for pause in (0.2, 0.8, 2, 4):
        try:
            return new.replace(old)
        except PermissionError:
            time.sleep(pause)
    new.replace(old)


def read_config(folder, script=None):
    """The settings in a folder's config.json, which `script` must have written."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        writer = config["script"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so there is no run to go on with") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a run's folder") from None
    except (ValueError, TypeError, KeyError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: damaged ({kind}); start again with another --out") from None
    if script not in (None, writer):
        raise UserError(f"{folder}: a run of {writer}, not of {script}")
    return config


def checkpoint_of(folder):
    """The folder that --resume loads. UserError where a run has saved none."""
    for name in ("checkpoint", "checkpoint.old"):  # .old: killed between two renames
        if (Path(folder) / name / "state.pt").exists():
            return Path(folder) / name
    raise UserError(
        f"{folder}: no checkpoint/state.pt in it, so there is nothing to resume; start again "
        "with another --out"
    )


def lines_of(folder):
    """The samples that an evaluation has written, those of a shard in a file of its own."""
    rows = []
    for path in sorted(Path(folder).glob("samples*.jsonl")):
        if re.fullmatch(r"samples(-\d+)?\.jsonl", path.name):  # no copy of one
            rows += read_jsonl(path, LINE)
    return rows


def read_samples(folder):
    """{"DATA DECODER": samples} of an evaluation's folder, those of all shards in the order in
    which one process would have drawn them. A sample's later line counts."""
    samples = {}
    for sample in sorted(lines_of(folder), key=lambda sample: (sample["job"], sample["place"])):
        samples[sample["data"], sample["decoder"], sample["seed"], sample["place"]] = sample
    if not samples:
        raise UserError(f"{folder}: no samples.jsonl with samples of an evaluation in it")
    stems = {data: Path(data).stem for data, *_ in samples}
    results = {}
    for (data, decoder, *_), sample in samples.items():
        shared = list(stems.values()).count(stems[data]) > 1
        name = data if shared else stems[data]
        results.setdefault(f"{name} {decoder}", []).append(sample)
    return results
