"""
Jobs for findings.py and real.py: processes that run beside each other, each once.

A finished job is not done again, so after Ctrl-C the same command goes on. A training run that was
killed is resumed from its checkpoint if it has one; any other job starts again.
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

from engine.files import checkpoint_of, lock, replace_file
from tasks.errors import UserError


class Job(NamedTuple):
    """A process, "python COMMAND --out OUT", that waits for the jobs `after`."""

    out: Path
    command: list
    after: tuple
    threads: int = 1  # unless OMP_NUM_THREADS says otherwise


def depth(job):
    """How many jobs must be done one after the other before this one can begin?"""
    return max((1 + depth(earlier) for earlier in job.after), default=0)


def in_order(wanted):
    """Jobs and all that they wait for, each once, and those first that wait for the fewest."""
    jobs = {}
    for job in wanted:
        for needed in [*in_order(job.after), job]:
            jobs[needed.out] = needed
    return sorted(jobs.values(), key=depth)


def run_job(job, folder):
    """Run a job, unless it is finished: the seconds that it took. UserError if it fails."""
    name = job.out.name
    log, finished = folder / f"logs/{name}.txt", folder / f"logs/{name}.finished"
    if finished.exists():
        command, seconds = json.loads(finished.read_text(encoding="utf-8"))
        if command == job.command:
            return seconds
        shutil.rmtree(job.out, ignore_errors=True)  # it was made with other settings
    try:
        checkpoint_of(job.out)
        flag = "--resume"
    except UserError:  # em_rl.py writes into an empty folder only
        shutil.rmtree(job.out, ignore_errors=True)
        flag = "--out"
    command = [sys.executable, *job.command, flag, job.out]
    environment = {"OMP_NUM_THREADS": f"{job.threads}"} | os.environ
    started = time.time()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        raise UserError(f"{name} failed with exit code {code}; {log} ends with: {lines[-1]}")
    seconds = time.time() - started
    replace_file(finished, json.dumps([job.command, seconds]))
    return seconds


def execute(wanted, at_a_time, folder):
    """Run jobs and what they wait for: the seconds that all took. UserError for the first that
    fails, when those beside it have ended, and where another process does the same."""
    held = lock(folder)
    (folder / "logs").mkdir(exist_ok=True)
    futures = {}

    def in_turn(job):
        for earlier in job.after:  # they stand before it in the queue, so they have begun
            futures[earlier.out].result()
        return run_job(job, folder)

    pool = ThreadPoolExecutor(at_a_time)
    try:
        for job in in_order(wanted):
            futures[job.out] = pool.submit(in_turn, job)
        done = as_completed(futures.values())
        bar = tqdm(done, total=len(futures), desc=folder.name, unit="job", smoothing=0)
        return sum(future.result() for future in bar)
    finally:
        pool.shutdown(cancel_futures=True)
        held.release()
