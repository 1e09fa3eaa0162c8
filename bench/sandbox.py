"""
How much faster is grading programs in parallel than one by one? Both in the same run.

    python bench/sandbox.py                    # 200 programs on all cores

Programs do some work of their own (a sieve of --size), half of them are wrong, half have Python tests and half input and output.
Prints the seconds for each way and their ratio, after checking every verdict.
"""
import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import grade, has_namespaces

PROGRAM = """
def primes(n):
    sieve = [True] * n
    for i in range(2, n):
        if sieve[i]:
            sieve[2 * i :: i] = [False] * len(sieve[2 * i :: i])
    return sum(sieve) - {wrong}
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200, help="programs to grade (default: %(default)s)")
    parser.add_argument("--size", type=int, default=100_000, help="length of the sieve; 100,000 takes 10 ms (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at a time (default: one for each core, %(default)s)")
    args = parser.parse_args()
    count = sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, args.size))
    jobs, wanted = [], []
    for i in range(args.programs):
        right = i % 4 < 2
        program = PROGRAM.format(wrong=2 if right else 1)  # 0 and 1 are in the sieve, and no primes
        tests = f"assert primes({args.size}) == {count}"
        pair = [{"input": f"{args.size}\n", "output": f"{count}\n"}]
        jobs.append((program, tests) if i % 2 else (program + "print(primes(int(input())))", pair))
        wanted.append(right)
    confinement = "namespaces and limits" if has_namespaces() else "limits only"  # also keeps its first try out of the seconds
    seconds = {}
    for workers in 1, args.workers:
        start = time.perf_counter()
        verdicts = grade(jobs, workers)
        seconds[workers] = time.perf_counter() - start
        assert verdicts == wanted, f"{sum(a != b for a, b in zip(verdicts, wanted))} wrong verdicts with {workers} workers"
    print(f"{args.programs} programs, {confinement}, {os.cpu_count()} cores: one by one {seconds[1]:.1f} s, {args.workers} at a time "
          f"{seconds[args.workers]:.1f} s, {seconds[1] / seconds[args.workers]:.2f} times as fast")
