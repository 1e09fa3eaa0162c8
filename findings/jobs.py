"""
Jobs for findings.py: processes that run beside each other, once.

What is finished is not done again, so after Ctrl-C the same command goes on. What a kill has
left half done is resumed if it is a training run with a checkpoint, else done afresh.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from engine.files import lock, replace_file
from engine.run import checkpoint_of
from tasks.errors import UserError


class Job(NamedTuple):
    """A process, "python COMMAND --out OUT", that waits for the jobs `after`."""

    out: Path
    command: list
    after: tuple


def with_needed(job):
    """The jobs that a job waits for, and it itself behind them."""
    for earlier in job.after:
        yield from with_needed(earlier)
    yield job


def depth(job):
    """How many jobs must be done one after the other before this one can begin?"""
    return max((1 + depth(earlier) for earlier in job.after), default=0)


def in_order(wanted):
    """Jobs and all that they need, each once, and those first that wait for the fewest."""
    jobs = {}
    for job in wanted:
        for needed in with_needed(job):
            jobs[needed.out] = needed
    return sorted(jobs.values(), key=depth)


def run_job(job, folder):
    """Run a job, unless it is finished: the seconds that it took. RuntimeError if it fails."""
    name = job.out.name
    finished = folder / f"logs/{name}.finished"
    if finished.exists():
        command, seconds = json.loads(finished.read_text(encoding="utf-8"))
        if command == job.command:
            return seconds
        shutil.rmtree(job.out, ignore_errors=True)  # it was made with other settings
    try:
        checkpoint_of(job.out)
        flag = "--resume"
    except UserError:  # what has no checkpoint yet would be in the way
        shutil.rmtree(job.out, ignore_errors=True)
        flag = "--out"
    started = time.time()
    log = folder / f"logs/{name}.txt"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, *job.command, flag, job.out], stdout=file, stderr=file,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
        ).returncode
    if code:
        raise RuntimeError(f"{name} failed with exit code {code}; the end of {log}:\n"
                           + log.read_text(encoding="utf-8", errors="replace")[-300:])
    seconds = time.time() - started
    replace_file(finished, json.dumps([job.command, seconds]))
    return seconds


def execute(wanted, at_a_time, folder):
    """Run jobs and what they need: the seconds that all took. RuntimeError for the first that
    fails, when those beside it have ended; UserError where another process does the same."""
    jobs = in_order(wanted)
    held = lock(folder)
    (folder / "logs").mkdir(exist_ok=True)
    futures = {}

    def in_turn(job):
        for needed in job.after:  # it stands earlier in the queue, so that it has begun
            futures[needed.out].result()
        return run_job(job, folder)

    pool = ThreadPoolExecutor(at_a_time)
    try:
        for job in jobs:
            futures[job.out] = pool.submit(in_turn, job)
        done = as_completed(futures.values())
        bar = tqdm(done, total=len(jobs), desc=folder.name, unit="job", smoothing=0)
        return sum(future.result() for future in bar)
    finally:
        pool.shutdown(cancel_futures=True)
        held.release()
