"""
The dossier of a GPU: what this project does on it, in one command.

    python bench/gpu.py --out gpu.json          # at most 9 minutes, which are for an H100
    python bench/gpu.py --only sampler,em_rl    # some of the parts
    python bench/gpu.py --dry                   # every part at toy size on the CPU

Every part runs in a process of its own with a time limit, so one that fails leaves the others.

The 7B model has Qwen2.5-7B's shape, random weights and tiny/base's tokenizer. So it ends no
response before --max-new-tokens, and EM-INF finds every row unsure, which costs most. Its
folder takes 15 GB of TMPDIR. On a GPU under 152 GB full training keeps masters, moments and
gradients in CPU memory: 122 GB.

The peak is that of a product of large square matrices, measured in the part's own process. MFU
counts FLOPs as the paper does: sampling, reference and update, without what --recompute
repeats. Hours for the paper's run are extrapolated: the seconds of a response token times the
paper's responses at 1,024 tokens each, which is assumed, and the optimiser's seconds once a
step. That leaves out evaluations, checkpoints, and that longer responses attend to more.
"""
import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose entropy.py and em_inf.py would be imported
import em_ft  # noqa: E402
import em_rl  # noqa: E402
from bench import rollouts  # noqa: E402
from bench.entropy import high_water, make_inputs, step  # noqa: E402
from em_inf import EMInf  # noqa: E402
from engine import cache as our_cache  # noqa: E402
from engine import run  # noqa: E402
from engine import sampler as our_sampler  # noqa: E402
from engine.arguments import Help, comma_list, positive  # noqa: E402
from engine.files import replace_file  # noqa: E402
from engine.load import load_model, set_up  # noqa: E402
from entropy import entropy_and_logprob, token_entropy  # noqa: E402
from scale import vllm_rollouts  # noqa: E402
from tasks.problems import load_problems  # noqa: E402
from tasks.prompts import encode_problem  # noqa: E402

TRAIN, TOKENIZER = str(ROOT / "tiny/train.jsonl"), ROOT / "tiny/base"
SIZES = dict(
    device="cuda",
    dtype="bfloat16",
    matmul=8192,  # rows and columns of the matrices that show the peak
    tokens=16_384,  # of the entropy
    rows=(64, 256),  # of the sampler
    sampled=128,  # tokens of a response there
    responses=128,  # of a training step
    trained=256,  # tokens of a response there
    model=dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    tiny=[],  # flags
)
DRY = dict(
    device="cpu", dtype="float32", matmul=256, tokens=64, rows=(4, 8), sampled=8, responses=8,
    trained=8,
    model=dict(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    ),
    tiny=["--steps", "2", "--prompts", "8", "--val-size", "16"],
)
NOMINAL = {  # dense bfloat16 TFLOP/s of the data sheets; the first name that fits counts
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
    "L40S": 362, "RTX 4090": 165,
}


def now(device):
    """Seconds of a clock, read when the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, device):
    started = now(device)
    function()
    return now(device) - started


def clock(owner, name, device, seconds):
    """Put a clock on owner.name: each of its calls adds its seconds to the list seconds[name]."""
    function = getattr(owner, name)
    seconds[name] = []

    def clocked(*args, **settings):
        started = now(device)
        result = function(*args, **settings)
        seconds[name].append(now(device) - started)
        return result

    setattr(owner, name, clocked)


def matmul_peak(sizes):
    """FLOP/s of a product of two large square matrices, the best of ten."""
    n, device = sizes["matmul"], sizes["device"]
    a = torch.randn(n, n, device=device, dtype=getattr(torch, sizes["dtype"]))
    multiply = functools.partial(torch.mm, a, a, out=torch.empty_like(a))
    times = [seconds_of(multiply, device) for _ in range(13)]
    return 2 * n**3 / min(times[3:])


def of_peak(speed, peak, device):
    """FLOP/s in words: their share of the measured peak and, if it is known, of the nominal."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    words = f"{speed / peak:.1%} of {peak / 1e12:.3g} TFLOP/s"
    for nominal in [NOMINAL[card] for card in NOMINAL if card in name][:1]:
        words += f" ({speed / 1e12 / nominal:.1%} of the nominal {nominal})"
    return words


def random_model(sizes):
    """The 7B model in eval mode, made on the device itself."""
    set_up(sizes["device"])
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **sizes["model"])
    with torch.device(sizes["device"]):
        dtype = getattr(torch, sizes["dtype"])
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@contextlib.contextmanager
def not_compiled():
    """Without torch.compile, as where there is no Triton."""
    modules = [sys.modules[name] for name in ("entropy", "em_inf")]
    before = [module.can_compile for module in modules]
    for module in modules:
        module.can_compile = lambda device, V: False
    yield
    for module, can_compile in zip(modules, before):
        module.can_compile = can_compile


def some_prompts(count):
    """Token ids of the first `count` training problems."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return [encode_problem(tokenizer, problem) for problem in load_problems(TRAIN)[:count]]


# --------------------------------------------------------------------------------- parts
# A part takes its sizes and the folder that all parts share. It gives a dict of numbers, in
# which "summary" is its cell of the table. Its docstring is the question there.


def weights(sizes, folder):
    """A random 7B model in a folder, for the parts that load it by name"""
    model = random_model(sizes)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
    return {"summary": f"{model.num_parameters():,} parameters"}


def entropy(sizes, folder):
    """`entropy_and_logprob` and its backward, 16,384 tokens at 7B: 4 matrix products (aim: 70 %)"""
    device, tokens = sizes["device"], sizes["tokens"]
    vocab, width = sizes["model"]["vocab_size"], sizes["model"]["hidden_size"]
    peak = matmul_peak(sizes)
    args = SimpleNamespace(device=device, dtype=sizes["dtype"], width=width)
    hidden, weight, targets = make_inputs(args, tokens, vocab)
    both_ways = functools.partial(step, "ours", hidden, weight, targets)
    seconds = median([seconds_of(both_ways, device) for _ in range(6)][1:])
    with not_compiled():
        eager = median([seconds_of(both_ways, device) for _ in range(4)][1:])
    speed = 4 * 2 * tokens * vocab * width / seconds
    memory = high_water(device) / 1e9
    with torch.no_grad():  # a few of the tokens, against float64
        few, exact = hidden[:64], hidden[:64].double() @ weight.double().T
        found, _ = entropy_and_logprob(few, weight, targets[:64])
        error = (found - token_entropy(exact)).abs().max().item()
    summary = (f"{1e3 * seconds:.0f} ms, {of_peak(speed, peak, device)}; {1e3 * eager:.0f} ms if "
               f"nothing is compiled; {memory:.1f} GB; "
               f"entropies within {error:.1g} nats of float64's")
    return dict(
        seconds=seconds, eager=eager, speed=speed, peak=peak, gigabytes=memory, error=error,
        summary=summary,
    )


def em_inf(sizes, folder):
    """EM-INF at 7B, 64 rows: its share of a decoding step, and alone (aim: 0.2 ms)"""
    device, rows, length = sizes["device"], sizes["rows"][0], sizes["sampled"]
    model, prompts = random_model(sizes), some_prompts(rows)
    sharpener, seconds = EMInf(), {}
    for owner, name in (sharpener, "sharpen"), (our_sampler, "prefill"), (our_sampler, "generate"):
        clock(owner, name, device, seconds)
    for tokens in 4, length:  # the first time warms up
        our_sampler.generate(model, prompts, [], tokens, batch_size=rows, sharpen=sharpener.sharpen)
    sharpening = 1e3 * sum(seconds["sharpen"][4:]) / length
    decoding = 1e3 * (seconds["generate"][1] - seconds["prefill"][1]) / length
    changed = sharpener.changed / sharpener.rows
    logits = torch.randn(rows, sizes["model"]["vocab_size"], device=device)
    descend = functools.partial(sharpener.function, logits)
    alone = 1e3 * median([seconds_of(descend, device) for _ in range(23)][3:])
    with not_compiled():
        eager = 1e3 * median([seconds_of(descend, device) for _ in range(23)][3:])
    summary = (f"{sharpening / decoding:.1%} ({sharpening:.2f} of {decoding:.1f} ms), with "
               f"{changed:.0%} of the rows sharpened; `minimize_entropy` alone {alone:.2f} ms, "
               f"and {eager:.2f} if it is not compiled")
    return dict(sharpening=sharpening, decoding=decoding, changed=changed, alone=alone,
                eager=eager, summary=summary)


def sampler(sizes, folder):
    """Tokens/s of our sampler at 7B, by CUDA graphs and without (aim: 8 ms a token at 64 rows)"""
    ways = {"graphs": (rollouts.ours, True), "no graphs": (rollouts.ours, False),
            "model.generate": (rollouts.transformers, False)}
    speeds = tokens_per_second(ways, sizes)
    model, prompts = random_model(sizes), some_prompts(sizes["rows"][0])
    greedy = []
    for our_cache.use_graphs in True, False:
        greedy.append(our_sampler.generate(model, prompts, [], 32, 0).responses)
    same = [a == b for a, b in zip(sum(greedy[0], []), sum(greedy[1], []))]
    speeds["same"] = sum(same) / len(same)
    speeds["summary"] += f"; {speeds['same']:.1%} of greedy tokens are the same with and without"
    return speeds


def compiled(sizes, folder):
    """Tokens/s of `model.generate` with a static cache, which it compiles"""
    static = functools.partial(rollouts.transformers, cache_implementation="static")
    return tokens_per_second({"static": (static, False)}, sizes)


def tokens_per_second(ways, sizes):
    """{"graphs at 64 rows": tokens/s, ..., "summary"}, 4 responses to a prompt, of which none
    stops. A way is a function of bench/rollouts.py, and whether it may use CUDA graphs."""
    device, length, speeds, words = sizes["device"], sizes["sampled"], {}, []
    model, tokenizer = random_model(sizes), AutoTokenizer.from_pretrained(TOKENIZER)
    for rows in sizes["rows"]:
        prompts, end = some_prompts(rows // 4), [sizes["model"]["vocab_size"]]  # none draws it
        for name, (way, our_cache.use_graphs) in ways.items():
            draw = functools.partial(way, model, tokenizer, prompts, end)
            draw(4)  # warms up
            seconds = seconds_of(functools.partial(draw, length), device)
            speeds[f"{name} at {rows} rows"] = round(rows * length / seconds)
            words.append(f"{name} at {rows} rows {rows * length / seconds:,.0f} "
                         f"({1e3 * seconds / length:.1f} ms a token)")
    return speeds | {"summary": "; ".join(words)}


def vllm(sizes, folder):
    """Tokens/s of vLLM as `--sampler vllm` uses it: its falling asleep afterwards counts"""
    dtype, length, speeds = getattr(torch, sizes["dtype"]), sizes["sampled"], {}
    model, _ = load_model(folder / "model", sizes["device"], dtype)
    engine = vllm_rollouts.start(str(folder / "model"), dtype, longest=512, share=0.5)
    for rows in sizes["rows"]:
        sample = functools.partial(vllm_rollouts.sample, engine, some_prompts(rows // 4), [])
        for tokens in 4, length:  # the first time warms up
            vllm_rollouts.load(engine, model.named_parameters())
            draw = functools.partial(sample, tokens, temperature=1.0, N=4, seed=1)
            seconds = seconds_of(draw, sizes["device"])
        speeds[f"vLLM at {rows} rows"] = round(rows * length / seconds)
    return speeds | {"summary": "; ".join(f"{name} {speeds[name]:,}" for name in speeds)}


def em_rl_step(sizes, folder):
    """An EM-RL step at 7B (aim: 12 h for the paper's run)"""
    flags = ["--steps", 2, "--prompts", sizes["responses"] // 4]
    return training_step(em_rl, flags, 100, 512 * 4, sizes, folder)


def em_ft_step(sizes, folder):
    """An EM-FT step at 7B, the first of its run"""
    flags = ["--steps", 1, "--prompts", sizes["responses"]]
    return training_step(em_ft, flags, 40, 512, sizes, folder)


def lora_step(sizes, folder):
    """An EM-RL step at 7B with `--lora 16`"""
    flags = ["--steps", 2, "--prompts", sizes["responses"] // 4, "--lora", 16]
    return training_step(em_rl, flags, 100, 512 * 4, sizes, folder)


def training_step(script, flags, paper_steps, paper_responses, sizes, folder):
    """The last step of a run, by its metrics.csv and by clocks on what the script calls."""
    device, seconds = sizes["device"], {}
    peak = matmul_peak(sizes)
    for name in "generate", "score_all":
        clock(script, name, device, seconds)
    for name in "clip", "step":
        clock(script.MasterAdamW, name, device, seconds)
    run.save_model = do_not_save
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    flags += ["--model", folder / "model", "--data", TRAIN, "--val", "none", "--out", out]
    flags += ["--device", device, "--dtype", sizes["dtype"], "--max-new-tokens", sizes["trained"]]
    script.main([str(flag) for flag in flags])
    row = run.read_rows(out / "metrics.csv")[-1]
    phases = {
        "sampling": seconds["generate"][-1],
        "reference": sum(seconds["score_all"][-1:]),  # EM-FT has none
        "optimiser": seconds["clip"][-1] + seconds["step"][-1],
    }
    phases["update"] = row["seconds"] - sum(phases.values())
    told = ", ".join(f"{name} {spent:.2f}" for name, spent in phases.items())
    speed, memory = row["flops"] / row["seconds"], high_water(device) / 1e9
    per_token = (row["seconds"] - phases["optimiser"]) / row["tokens"]
    paper_step = paper_responses * 1024 * per_token + phases["optimiser"]
    hours = paper_steps * paper_step / 3600
    summary = (f"{row['seconds']:.2f} s for {row['tokens']:,} response tokens ({told}); peak "
               f"memory {memory:.1f} GB; MFU {of_peak(speed, peak, device)}; {hours:.1f} h for "
               f"{paper_steps} steps of {paper_responses:,} responses of 1,024 tokens")
    return row | phases | dict(peak=peak, gigabytes=memory, hours=hours, summary=summary)


def do_not_save(*args):
    """In place of run.save_model: a checkpoint of 7B with its optimiser takes 107 GB."""


def tiny(sizes, folder):
    """`python em_rl.py` end to end, but for its imports"""
    runs = []
    for device in sizes["device"], "cpu":
        out = Path(tempfile.mkdtemp(dir=folder)) / "run"
        flags = ["--device", device, "--out", str(out), *sizes["tiny"]]
        seconds = seconds_of(functools.partial(em_rl.main, flags), sizes["device"])
        runs.append(run.read_rows(out / "metrics.csv")[-1] | {"seconds": seconds})
    summary = "; on the CPU: ".join(
        f"{row['seconds']:.1f} s, held-out greedy {row['val_greedy']:.1%}, T = 1 "
        f"{row['val_sampled']:.1%}, entropy {row['entropy']:.3f}" for row in runs
    )
    return {"runs": runs, "summary": summary}


PARTS = {  # the part and its limit in seconds
    "sampler": (sampler, 120),
    "em_inf": (em_inf, 60),
    "entropy": (entropy, 60),
    "weights": (weights, 90),
    "em_rl": (em_rl_step, 200),
    "lora": (lora_step, 120),
    "tiny": (tiny, 120),
    "em_ft": (em_ft_step, 160),
    "compiled": (compiled, 180),
    "vllm": (vllm, 150),
}
FROM_FOLDER = {"em_rl", "em_ft", "lora", "vllm"}  # they need what `weights` leaves

# ---------------------------------------------------------------------------- the dossier


def run_part(name, folder, dry, limit):
    """Run a part in a process of its own: its results, or {"failed": its last line, "log"}."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    log, result = folder / f"{name}.log", folder / f"{name}.json"
    with open(log, "w", encoding="utf-8") as output:
        part = subprocess.Popen(
            command + ["--dry"] * dry, stdout=output, stderr=output, start_new_session=True
        )
        try:
            ending = f"exit code {part.wait(limit)}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {limit:.0f} s"
        finally:
            if hasattr(os, "killpg"):  # and what it has started; not on Windows
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(part.pid, signal.SIGKILL)
            part.kill()
            part.wait()
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "it wrote nothing"
    return {"failed": f"{ending}: {last[:300]}", "log": text[-4000:]}


def run_here(name, folder, sizes):
    """The part's own process: run it, and leave its results for the process that waits."""
    if sizes["device"] == "cpu":
        torch.set_num_threads(1)  # for toy sizes
    result = PARTS[name][0](sizes, folder)
    on_gpu = sizes["device"] == "cuda"
    result["device"] = torch.cuda.get_device_name() if on_gpu else "the CPU, at toy size"
    replace_file(folder / f"{name}.json", json.dumps(result) + "\n")


def table(results):
    """The results as Markdown, a question a row."""
    devices = sorted({result["device"] for result in results.values() if "device" in result})
    on = f"{', '.join(devices)}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"| question | command | on {on} |", "|---|---|---|"]
    for name, result in results.items():
        cell = result.get("summary") or "failed: " + result["failed"].replace("|", "/")
        question = PARTS[name][0].__doc__
        lines.append(f"| {question} | `python bench/gpu.py --only {name}` | {cell} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--only", type=comma_list, default=",".join(PARTS), help="parts, with commas")
    add("--out", help="write the numbers to this JSON file, after each part")
    add("--minutes", type=positive, default=9.0, help="what is not done by then is left out")
    add("--dry", action="store_true", help="every part at toy size on the CPU")
    add("--part", help=argparse.SUPPRESS)  # for run_part
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return run_here(args.part, args.folder, DRY if args.dry else SIZES)
    for name in args.only:
        if name not in PARTS:
            parser.error(f"--only {name}: the parts are {', '.join(PARTS)}")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        parser.error(f"--out {args.out}: give a file, in a folder that there is")
    if not args.dry and not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no CUDA device here; --dry runs every part on the CPU")
    chosen = set(args.only)
    if chosen & FROM_FOLDER:
        chosen.add("weights")

    results = {}
    end = time.time() + 60 * args.minutes
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name in filter(chosen.__contains__, PARTS):
                started = time.time()
                result = {"failed": f"the {args.minutes:g} minutes were over before it"}
                if started < end:
                    limit = min(PARTS[name][1], end - started)
                    result = run_part(name, Path(folder), args.dry, limit)
                results[name] = result | {"part_seconds": time.time() - started}
                told = result.get("summary") or "failed: " + result["failed"]
                print(f"{name}, {results[name]['part_seconds']:.0f} s: {told}", flush=True)
                if args.out:
                    replace_file(Path(args.out), json.dumps(results, indent=1) + "\n")
    except KeyboardInterrupt:
        print("\nbench/gpu.py: stopped; this is what was done by then", file=sys.stderr)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
