"""
How much faster is grading programs in parallel than one by one? Both in the same run.

    python bench/sandbox.py    # 200 programs on all cores

Each program has some work of its own (a sieve). Half of them are wrong, and half have Python
tests, the others input and output. Prints the seconds of each way and their ratio, after
every verdict has been checked.
"""
import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.arguments import Help, positive_int
from engine.run import command
from tasks.sandbox import grade, has_namespaces

PROGRAM = """
def primes(n):
    sieve = [True] * n
    for i in range(2, n):
        if sieve[i]:
            sieve[2 * i :: i] = [False] * len(sieve[2 * i :: i])
    return sum(sieve) - {wrong}
"""


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--programs", type=positive_int, default=200, help="programs to grade")
    add("--size", type=positive_int, default=100_000, help="of the sieve; this takes 10 ms")
    add("--workers", type=positive_int, default=os.cpu_count(), help="programs at a time")
    args = parser.parse_args(argv)
    confined = "namespaces and limits" if has_namespaces() else "limits only"

    count = 0
    for n in range(2, args.size):
        count += all(n % divisor for divisor in range(2, int(n**0.5) + 1))
    tests = f"assert primes({args.size}) == {count}"
    pairs = [{"input": f"{args.size}\n", "output": f"{count}\n"}]
    jobs, expected = [], []
    for i in range(args.programs):
        right = i % 4 < 2
        program = PROGRAM.format(wrong=2 if right else 1)  # 0 and 1 are no primes
        by_output = (program + "print(primes(int(input())))", pairs)
        jobs.append((program, tests) if i % 2 else by_output)
        expected.append(right)

    seconds = {}
    for workers in 1, args.workers:
        start = time.perf_counter()
        verdicts = grade(jobs, workers)
        seconds[workers] = time.perf_counter() - start
        assert verdicts == expected, f"wrong verdicts with {workers} workers"
    one, many = seconds[1], seconds[args.workers]
    print(f"{args.programs} programs, {confined}, {os.cpu_count()} cores: one by one {one:.1f} s, "
          f"{args.workers} at a time {many:.1f} s, {one / many:.2f} times as fast")


if __name__ == "__main__":
    main()
