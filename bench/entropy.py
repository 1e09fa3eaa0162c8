"""
Entropy and log-prob from the last hidden states, forward and backward: time and peak memory beside the alternatives.

    python bench/entropy.py                                                            # 2,048 x 50,000 x 512, float32, CPU
    python bench/entropy.py --device cuda --dtype bfloat16 --tokens 16384 --vocab 152064 --width 3584

One row per version, all on the same inputs in one run:

    naive          logits, log_softmax, entropy and gather, under autograd: tokens x vocabulary several times over
    chunked        the same in chunks of rows, still under autograd, which keeps every chunk: saves nothing
    checkpointed   the chunks recomputed in the backward by torch.utils.checkpoint
    ours           entropy.entropy_and_logprob

Peak memory is what a forward and backward needs above its inputs (the gradients are part of it): on a CPU the process's
high-water mark, in a process of its own; on a GPU the allocator's. Time is the median over --repeats rounds, the versions taking
turns in each. "of peak" is the share of the rate that a plain product of these shapes reaches here, counting the four products that
are needed without storing logits (logits twice, and one for each gradient). Error: the largest of both gradients' relative errors
against the naive version in the inputs' dtype, ||g - g_naive|| / ||g_naive||.
"""
import argparse
import gc
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from entropy import entropy_and_logprob, token_entropy


def naive(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return token_entropy(logits), logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def in_chunks(f, rows):
    return lambda h, w, t: map(torch.cat, zip(*[f(h[i : i + rows], w, t[i : i + rows]) for i in range(0, len(h), rows)]))


VERSIONS = {
    "naive": naive,
    "chunked": in_chunks(naive, 128),
    "checkpointed": in_chunks(lambda *inputs: checkpoint(naive, *inputs, use_reentrant=False), 128),
    "ours": entropy_and_logprob,
}


def make_inputs(args):
    generator = torch.Generator(args.device).manual_seed(0)
    empty = lambda *shape: torch.empty(*shape, device=args.device, dtype=getattr(torch, args.dtype))
    hidden, weight = empty(args.tokens, args.width), empty(args.vocab, args.width)
    hidden.normal_(generator=generator), weight.normal_(std=3 / args.width**0.5, generator=generator)  # logits of standard deviation 3
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(args.vocab, (args.tokens,), device=args.device, generator=generator)


def step(version, hidden, weight, targets):
    """One forward and backward of a loss that needs both results; the gradients lie in .grad afterwards."""
    hidden.grad = weight.grad = None
    entropy, logprob = VERSIONS[version](hidden, weight, targets)
    (entropy.mean() - 0.5 * logprob.mean()).backward()


def peak_memory(version, args, queue=None):
    """Bytes above the inputs. On a CPU to be called in a fresh process, which sends the figure through `queue`."""
    inputs = make_inputs(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(version, *inputs)
        return torch.cuda.max_memory_allocated() - before
    small = [x[:64].detach().requires_grad_(x.is_floating_point()) for x in inputs]
    step(version, small[0], small[1], small[2] % 64)  # loads what a first call loads
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(version, *inputs)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)


def seconds(f, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the inputs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of hidden states (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=50_000, help="tokens in the vocabulary (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="width of the hidden states (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed, after one that is not (default: %(default)s)")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS), help="naive is the reference and always runs first")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/entropy.py: --device cuda: torch sees no CUDA device here")
    versions = list(dict.fromkeys(["naive"] + args.versions))

    memory = {}
    for version in versions:
        if args.device == "cuda":
            try:
                memory[version] = peak_memory(version, args)
            except torch.OutOfMemoryError:
                print(f"{version}: does not fit in this GPU's memory")
            gc.collect(), torch.cuda.empty_cache()
        else:
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=peak_memory, args=(version, args, queue))
            process.start()
            memory[version] = queue.get()
            process.join()

    inputs = make_inputs(args)
    hidden, weight, _ = inputs
    logits = torch.empty(args.tokens, args.vocab, device=args.device, dtype=hidden.dtype)
    product = [seconds(lambda: torch.mm(hidden.detach(), weight.detach().T, out=logits), args.device) for _ in range(args.repeats + 1)]
    del logits
    times, errors, reference = {v: [] for v in memory}, {}, None
    for round in range(args.repeats + 1):
        for version in memory:
            times[version].append(seconds(lambda: step(version, *inputs), args.device))
            if round == 0:
                gradients = hidden.grad, weight.grad
                reference = reference or gradients
                errors[version] = max(((g - r).norm() / r.norm()).item() for g, r in zip(gradients, reference))
    median = lambda values: sorted(values[1:])[len(values[1:]) // 2]
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.tokens:,} tokens x {args.vocab:,} vocabulary x {args.width:,} width, {args.dtype}, {name}; torch {torch.__version__}")
    base = next(iter(memory))
    print(f"\n| version | peak memory, MB | of {base}'s | time, s | of {base}'s | of peak | gradient error |\n|---|---|---|---|---|---|---|")
    for version in memory:
        share = 4 * median(product) / median(times[version])
        print(f"| {version} | {memory[version] / 1e6:,.0f} | {memory[version] / memory[base]:.3f} | {median(times[version]):.3f} | "
              f"{median(times[version]) / median(times[base]):.2f} | {share:.0%} | {errors[version]:.1e} |")
