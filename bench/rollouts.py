"""
Do rows that leave the batch when they have ended pay? A step's rollouts by three samplers, in turn, on the same prompts.

    python bench/rollouts.py                       # the tiny model's 64 prompts x 4
    python bench/rollouts.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k --prompts 4 --max-new-tokens 256
    python bench/rollouts.py --model Qwen/Qwen2.5-Math-7B --data math500 --prompts 64 --max-new-tokens 3072 --device cuda

whole is one call of model.generate, which feeds ended rows padding until the last one ends; generate is eval.generate with all rows in one batch;
paged is transformers' continuous batching. All draw from the same distribution, so their lengths differ by chance only.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as ev
from rollouts import generate_paged

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny/base"), help="folder or Hub id (default: the tiny model)")
    parser.add_argument("--data", default=str(ROOT / "tiny/train.jsonl"), help="prompts: JSONL file or name (default: the tiny world's)")
    parser.add_argument("--prompts", type=int, default=64, help="the first so many (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=4, metavar="N", help="responses per prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response, tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all three, after one that does not count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cuda, mps or cpu (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        problems = ev.load_problems(args.data)[: args.prompts]
        model, tokenizer = ev.load_model(args.model, *ev.set_up(args.device))
    except (OSError, ValueError) as error:
        sys.exit(f"bench/rollouts.py: {error}")
    stop, T = ev.stop_ids(model, tokenizer), args.max_new_tokens
    prompts = [prompt for prompt in (ev.encode_prompt(tokenizer, p["prompt"]) for p in problems) for _ in range(args.rollouts)]

    def whole():
        inputs = ev.pad_left(prompts, model.device)
        output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                generation_config=ev.sampling_config(stop, T, 1.0))[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: next((n for n, token in enumerate(row, 1) if token in stop), len(row))] for row in output]

    samplers = {"whole": whole, "generate": lambda: ev.generate(model, prompts, stop, T, budget=2**62),
                "paged": lambda: generate_paged(model, prompts, stop, T)}
    seconds, tokens = {name: [] for name in samplers}, {name: [] for name in samplers}
    for seed in range(args.rounds + 1):
        for name, sample in samplers.items():
            torch.manual_seed(seed)
            started = time.perf_counter()
            responses = sample()
            if seed:
                seconds[name].append(time.perf_counter() - started)
                tokens[name].append(sum(map(len, responses)))
    print(f"{Path(args.model).name}, {len(prompts)} responses of at most {T} tokens, {sum(tokens['whole']) / args.rounds / len(prompts):.1f} on "
          f"average; {args.device}, {args.threads} threads; torch {torch.__version__}\n")
    print("| sampler | seconds | tokens a second | seconds of whole's, by round |\n|---|---|---|---|")
    for name in samplers:
        ratios = [a / b for a, b in zip(seconds[name], seconds["whole"])]
        print(f"| {name} | {statistics.median(seconds[name]):.3f} | {sum(tokens[name]) / sum(seconds[name]):,.0f} | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
