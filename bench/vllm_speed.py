"""
What EM-INF costs in vLLM: tokens a second of an engine with the processor and of one without.

    python bench/vllm_speed.py                                  # the tiny model
    python bench/vllm_speed.py --model FOLDER --requests 64     # rows of a step: at most 64

Sampling at T = 1 to a fixed length. Medians of rounds that take turns, after a first; the share
is the median of each round's. The second engine without the processor shows the noise.
"""
import argparse
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of bench/, whose em_inf.py would be imported
from transformers import AutoTokenizer  # noqa: E402

from scale import vllm_rollouts  # noqa: E402
from tasks.problems import load_problems  # noqa: E402
from tasks.prompts import encode_problem  # noqa: E402

MANY = [{"em_inf": {"delta": 0.005 * i}} if i % 2 else None for i in range(64)]
CASES = {  # the settings that requests have in turn
    "without": [None],
    "without, again": [None],
    "none asks": [None],
    "half, one delta": [None, {"em_inf": {"delta": 0.3}}],
    "half, 32 deltas": MANY,
    "all, one delta": [{"em_inf": {"delta": 0.3}}],
    "all, 10 steps": [{"em_inf": {"delta": 0.3, "steps": 10}}],
    "all, adaptive": [{"adaptive_temperature": {"alpha": 0.5}}],
}


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", default=str(ROOT / "tiny/base"))
    add("--dtype", default="float32")
    add("--requests", type=int, default=256)
    add("--tokens", type=int, default=48)
    add("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems = load_problems(str(ROOT / "tiny/test.jsonl"))[: args.requests]
    prompts = [encode_problem(tokenizer, problem) for problem in problems]
    longest = max(map(len, prompts)) + args.tokens
    engines = {}
    for name in CASES:
        if len(engines) < 3:  # the third has the processor, and the other cases share it
            processors = ["scale.em_inf_vllm:EMInfVLLM"] if len(engines) == 2 else []
            engine = vllm_rollouts.start(
                args.model, args.dtype, longest, share=0.3, batch_size=64,
                logits_processors=processors, enable_sleep_mode=False,
            )
        engines[name] = engine
    seconds = {name: [] for name in CASES}
    for _ in range(args.rounds + 1):
        for name, settings in CASES.items():
            seconds[name].append(time_of(engines[name], prompts, settings, args.tokens))
    for name, spent in seconds.items():
        rate = len(prompts) * args.tokens / median(spent[1:])
        ratios = [plain / other for plain, other in zip(seconds["without"], spent)]
        print(f"{name:16} {rate:8,.0f} tokens/s, {median(ratios[1:]):.2f} of without")


def time_of(engine, prompts, settings, tokens):
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = []
    for i in range(len(prompts)):
        params.append(SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, seed=i,
            extra_args=settings[i % len(settings)],
        ))
    started = time.perf_counter()
    engine.generate(inputs, params, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
