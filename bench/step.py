"""
One training step of a real architecture with random weights: does it fit, how fast is it, how long would the paper's run take?

    python bench/step.py --config Qwen/Qwen2.5-Math-7B                      # EM-RL on one 80 GB GPU; the shapes stand below, no network
    python bench/step.py --config Qwen/Qwen2.5-Math-7B --script em_ft
    python bench/step.py --config tiny --sequences 256 --new-tokens 64 --length 64 --budget 8192      # on a CPU, to see that it runs

Each part of the step is measured by itself, with the functions that em_rl.py and em_ft.py call: rollouts of --sequences at once (random weights
hardly ever end a response, so all are --new-tokens long), scoring and update on a few micro-batches of random tokens, the optimiser's step.
The projection puts them together for the paper's run, for responses of --length tokens on average, which is a guess: print the `length` column of a
real run and put it there. Model-FLOPs utilisation counts 6 P per token of the update, no attention and no recomputation, against --peak.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import em_ft
import em_rl
import rollouts
import run
from eval import batches, output_head, score, score_all, set_up

CONFIGS = {
    "Qwen/Qwen2.5-Math-7B": lambda: Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
        max_position_embeddings=4096, rope_theta=10000.0, tie_word_embeddings=False),
    "Qwen/Qwen2.5-0.5B": lambda: Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
        max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=True),
    "tiny": lambda: LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=280,
                                max_position_embeddings=512, tie_word_embeddings=True)}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "T4": 8.1e12}  # FLOP/s by the data sheets: dense bf16, the T4's float32
PAPER = {"em_rl": dict(steps=100, sequences=2048), "em_ft": dict(steps=40, sequences=512)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="Qwen/Qwen2.5-Math-7B", help="architecture (default: %(default)s)")
    parser.add_argument("--script", choices=list(PAPER), default="em_rl", help="whose step (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=2048, help="rollouts at once (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of each rollout that is measured (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1000, help="mean response of the projected run, tokens (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of scoring and update to measure (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens per micro-batch (default: %(default)s)")
    parser.add_argument("--beta", type=float, help="weight of the KL (default: 0.001 for em_rl, 0 for em_ft)")
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, help="masters and Adam in CPU memory (default: if needed)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations")
    parser.add_argument("--rollouts-with", choices=["paged", "generate"], help="default: paged on a GPU")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (default: bfloat16 on a GPU that has it)")
    parser.add_argument("--peak", type=float, help="the device's FLOP/s (default: by its name, where known)")
    args = parser.parse_args()
    device, dtype = set_up(args.device, args.dtype)
    cuda = device.startswith("cuda")
    beta = args.beta if args.beta is not None else {"em_rl": 0.001, "em_ft": 0.0}[args.script]
    torch.manual_seed(0)

    def timed(function):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    def new_model():
        torch.set_default_dtype(dtype)
        with torch.device(device):
            made = AutoModelForCausalLM.from_config(CONFIGS[args.config](), dtype=dtype)
        torch.set_default_dtype(torch.float32)
        return made.eval()

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(CONFIGS[args.config](), dtype=dtype)
    most = args.prompt_tokens + max(args.length, args.new_tokens)
    how = rollouts.choose(args.rollouts_with, device, dtype)
    sizes = args.checkpointing, max(args.budget, most), 0 if how == "paged" else max(8 * args.budget, most)
    try:
        offload, memory = run.fit(shape, device, beta, args.offload, *sizes)
    except ValueError as error:
        sys.exit(f"step.py: {error}")
    expected = sum(run.memory(shape, device, beta, offload, *sizes)[0].values())
    model = new_model()
    reference = new_model() if beta else None
    head, ref_head = (output_head(m, list(range(8))) if m else None for m in (model, reference))
    if args.checkpointing:
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    optimizer = run.MasterAdamW(model, 1e-6, offload)
    P, V = sum(p.numel() for p in model.parameters()), model.config.vocab_size
    where = torch.cuda.get_device_name(0) if cuda else device
    peak = args.peak or next((flops for name, flops in PEAK.items() if name in where), None)
    print(f"{args.config}, {P / 1e9:.3g} B random parameters in {dtype}, {args.script} with beta {beta}, on {where}; torch {torch.__version__}")
    print(f"memory: {memory}", flush=True)

    draw = lambda count, length: torch.randint(0, V, (count, length)).tolist()
    prompts = [prompt for prompt in draw(-(-args.sequences // 4), args.prompt_tokens) for _ in range(4)][: args.sequences]
    rollouts.roll_out(how, model, prompts[:4], [V - 1], 8, 1.0, 8 * args.budget)  # warm-up
    rollout_s, (responses, _) = timed(lambda: rollouts.roll_out(how, model, prompts, [V - 1], args.new_tokens, 1.0, 8 * args.budget, "rollouts"))
    rolled = sum(map(len, responses))
    print(f"rollouts ({how}): {rolled / rollout_s:,.0f} tokens/s, {len(prompts)} sequences of {rolled / len(prompts):.0f} tokens", flush=True)

    per_batch = max(1, args.budget // (args.prompt_tokens + args.length))
    prompts, responses = draw(args.micro_batches * per_batch, args.prompt_tokens), draw(args.micro_batches * per_batch, args.length)
    tokens = len(prompts) * (args.prompt_tokens + args.length)  # that go through the model
    scored = prompts, responses, 1.0, args.budget
    score_all(model, head, prompts[:1], responses[:1])  # warm-up
    score_s, (_, old_logprobs, _) = timed(lambda: score_all(model, head, *scored))
    print(f"scoring: {tokens / score_s:,.0f} tokens/s", flush=True)
    ref_logprobs = score_all(reference, ref_head, *scored)[1] if beta else old_logprobs

    def update():
        model.train()
        for group in batches([args.prompt_tokens + args.length] * len(prompts), args.budget):
            entropy, logprobs, mask = score(model, head, [prompts[i] for i in group], [responses[i] for i in group])
            ref, old, advantages = ref_logprobs[group], old_logprobs[group], torch.randn(len(group), device=device)
            (em_rl.policy_loss(logprobs, old, ref, advantages, mask, tokens, beta, 0.2) if args.script == "em_rl" else
             em_ft.loss_of("entropy", entropy, logprobs, ref, mask, tokens, beta)).backward()
        model.eval()

    update()  # warm-up
    update_s, _ = timed(update)
    used = f"{6 * P * tokens / update_s / peak:.1%} model-FLOPs utilisation of {peak / 1e12:.0f} TFLOP/s" if peak else "no --peak, so no utilisation"
    print(f"update: {tokens / update_s:,.0f} tokens/s, {used}", flush=True)
    step_s, (_, changed) = timed(lambda: optimizer.step(1.0))
    print(f"optimiser: {step_s:.2f} s a step, {changed:.1%} of the masters moved", flush=True)
    if cuda:
        most = torch.cuda.max_memory_allocated()
        print(f"memory: {most / 1e9:.1f} GB at the peak, {most / expected - 1:+.0%} against the {expected / 1e9:.1f} GB expected")
    print(f"memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")

    steps, sequences = PAPER[args.script]["steps"], PAPER[args.script]["sequences"]
    through = sequences * (args.prompt_tokens + args.length)  # tokens a step
    passes = (2 if beta else 1) if args.script == "em_rl" else (1 if beta else 0)  # policy and reference are scored by em_rl, reference by em_ft
    parts = {"rollouts": sequences * args.length * rollout_s / rolled, "scoring": passes * through * score_s / tokens,
             "update": through * update_s / tokens, "optimiser": step_s}
    print(f"the paper's {args.script} run, {steps} steps of {sequences} responses of {args.length} tokens: {steps * sum(parts.values()) / 3600:.1f} h; a "
          "step: " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items()))
