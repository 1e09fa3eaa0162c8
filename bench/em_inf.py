"""
EM-INF beside the released way, and beside the sampling that follows it anyway.

    python bench/em_inf.py                                     # 16 x 152,064 float32 logits, CPU
    python bench/em_inf.py --device cuda --rows 64             # and inside the decode loop of a 7B architecture with random weights

Rows have a language model's tail: the token of rank r has a logit of -a log r, with a such that entropies go from 0.31 to 6 nats. All
versions on the same logits in one run, median seconds over --repeats rounds in which they take turns; "error" is the largest difference
in probability from the released algorithm in float64.

    released       autograd and torch.optim.Adam, row by row
    ours           entropy.minimize_entropy
    compiled       the same through torch.compile (with --compile; slow at the start; needs a C++ compiler on a CPU)
    tail held      the tokens less likely than --tail / vocabulary stay where they are, with their share of the normaliser and of the entropy
                   kept exact. How many these are depends on the row: no CUDA graph, no compilation
    sampling       softmax and multinomial, which every sampled step pays
    EMInf          the LogitsProcessor: finds the rows that need it, and checks for nan

On a CUDA device it then decodes with the shape of Qwen2.5-Math-7B, random weights and bfloat16, with and without EMInf.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from em_inf import EMInf
from entropy import minimize_entropy

QWEN_7B = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, tie_word_embeddings=False)


def zipf(rows, V, low, high):
    """(rows, V) logits -a log rank in random order, with entropies evenly spaced from low to high (nats)."""
    rank, out = torch.arange(1, V + 1, dtype=torch.float64).log(), []
    for target in torch.linspace(low, high, rows):
        small, large = 0.0, 20.0
        for _ in range(50):
            a = (small + large) / 2
            small, large = (a, large) if torch.distributions.Categorical(logits=-a * rank).entropy() > target else (small, a)
        out.append((-a * rank)[torch.randperm(V)])
    return torch.stack(out)


def released(logits, delta=0.3, lr=0.1, steps=3, kl_weight=0.05):
    out = []
    for row in logits.split(1):
        z, start = torch.nn.Parameter(row.clone()), row.softmax(-1)
        adam = torch.optim.Adam([z], lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            logprobs = z.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum()
            if entropy < delta:
                break
            (entropy + kl_weight * torch.nn.functional.kl_div(logprobs, start, reduction="sum")).backward()
            adam.step()
        out.append(z.detach())
    return torch.cat(out)


@torch.no_grad()
def tail_held(logits, tail, delta=0.3, lr=0.1, steps=3, kl_weight=0.05):
    """Row by row, the same descent on the tokens whose probability is at least tail / V; the others hold less than `tail` together."""
    out = logits.clone()
    for row in out:
        z = row - row.logsumexp(-1)  # log-probs
        p = z.exp()
        H = -torch.dot(p, z)
        head = (p >= tail / len(p)).nonzero()[:, 0]
        z, start = z[head], p[head]
        tail_mass, tail_plogp = (p.sum() - start.sum()).clamp(min=0), -H - torch.dot(start, z)
        m, v, now, log_total = torch.zeros_like(z), torch.zeros_like(z), start, torch.zeros(())
        for t in range(1, steps + 1):
            if H < delta:
                break
            grad = -now * (z - log_total + H) + kl_weight * (now - start)
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad
            z = z - lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            total = z.exp().sum() + tail_mass
            now, log_total = z.exp() / total, total.log()
            H = log_total - ((now * z).sum() + tail_plogp / total)
        row[head] += z - (row[head] - row.logsumexp(-1))
    return out


def medians(versions, logits, repeats, synchronize):
    seconds = {name: [] for name in versions}
    for _ in range(repeats + 1):  # the first round warms up
        for name, version in versions.items():
            synchronize()
            started = time.perf_counter()
            version(logits)
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: sorted(s[1:])[repeats // 2] for name, s in seconds.items()}


def decode_loop(rows, new_tokens, compile, repeats):
    """Seconds a step of `model.generate` with a 7B shape: without and with EMInf, taking turns."""
    import eval as ev
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B)).eval()
    torch.set_default_dtype(torch.float32)
    prompts = torch.randint(1000, (rows, 128)).tolist()
    em_inf, seconds = EMInf(compile=compile), {"plain": [], "EMInf": []}
    for _ in range(repeats + 1):
        for name, processors in ("plain", []), ("EMInf", [em_inf]):
            torch.cuda.synchronize()
            started = time.perf_counter()
            ev.generate(model, prompts, [QWEN_7B["vocab_size"] - 1], new_tokens, processors=processors)
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started) / new_tokens)
    return {name: sorted(s[1:])[repeats // 2] for name, s in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="rows of logits (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=152064, help="vocabulary (default: %(default)s)")
    parser.add_argument("--entropies", type=float, nargs=2, default=[0.31, 6.0], metavar="NATS", help="lowest and highest (default: %(default)s)")
    parser.add_argument("--tail", type=float, default=3e-5, help="most mass that is held still (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--new-tokens", type=int, default=64, help="steps of the decode loop on a GPU (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    exact = zipf(args.rows, args.vocab, *args.entropies)
    wanted, logits = released(exact).softmax(-1), exact.float().to(args.device)
    em_inf, ids = EMInf(), torch.zeros(args.rows, 1, dtype=torch.long)
    versions = {"released": released, "ours": minimize_entropy, "tail held": lambda z: tail_held(z.cpu(), args.tail).to(z.device),
                "sampling": lambda z: torch.multinomial(z.softmax(-1), 1), "EMInf": lambda z: em_inf(ids, z)}
    if args.device == "cuda":
        versions.pop("tail held")
    if args.compile:
        versions["compiled"] = torch.compile(minimize_entropy)
    seconds = medians(versions, logits, args.repeats, torch.cuda.synchronize if args.device == "cuda" else lambda: None)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.rows} x {args.vocab:,} float32, {args.entropies[0]} to {args.entropies[1]} nats, {name}\n")
    print("| version | ms | released takes | of sampling | error |\n|---|---|---|---|---|")
    for name, s in seconds.items():
        error = "" if name == "sampling" else f"{(versions[name](logits).double().softmax(-1).cpu() - wanted).abs().max():.1e}"
        print(f"| {name} | {1e3 * s:.2f} | {seconds['released'] / s:.1f} x | {s / seconds['sampling']:.2f} | {error} |")
    if args.device == "cuda":
        step = decode_loop(args.rows, args.new_tokens, args.compile, 3)
        print(f"\nA step of generate, 7B shape in bfloat16, {args.rows} rows: {1e3 * step['plain']:.2f} ms without EMInf, {1e3 * step['EMInf']:.2f} ms with "
              f"it{' (compiled)' if args.compile else ''}: {step['EMInf'] / step['plain'] - 1:+.1%}")
