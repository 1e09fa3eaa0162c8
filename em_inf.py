"""
EM-INF: sharper decoding without training. At every step the next token's logits go a few steps downhill in their own entropy.

    python em_inf.py                                                        # the tiny model: answers side by side, and a table
    python em_inf.py --prompt "Mod 10, left to right: 8-7*6"                # one answer, streamed
    python em_inf.py --model Qwen/Qwen2.5-7B-Instruct --prompt "What is 17 * 23?"
    python em_inf.py --model Qwen/Qwen2.5-7B-Instruct --data math500 --decode greedy,sample,em-inf

In your own code, with any causal model, batch, padding and other processors of transformers:

    from em_inf import EMInf
    model.generate(**inputs, do_sample=True, temperature=0.1, logits_processor=[EMInf()])

It works on the logits as the model gives them, before the sampling temperature. The most likely token stays the most likely one (nearly
always: see `entropy.minimize_entropy`), so greedy decoding does not change and EM-INF matters only where tokens are sampled.

Departures from the paper (arXiv 2505.15134) and its released code:
  - A batch at once, and every row stops by itself; the released code steps one row at a time.
  - A masked token (logit -inf) stays masked. There it makes the row nan.
  - The entropy is that of the distribution, where the released code adds 1e-12 to each probability.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import LogitsProcessor, TextStreamer

from entropy import adaptive_temperature, in_cache, minimize_entropy, token_entropy

HERE, NAME = Path(__file__).parent, Path(__file__).name
TINY = dict(model=str(HERE / "tiny/base"), data=str(HERE / "tiny/test.jsonl"), steps=10, temperature=1.0, max_new_tokens=64)
DECODERS = "greedy,sample,sample@0.1,adaptive-temperature,em-inf,self-consistency,refine,em-inf+self-consistency"

# ------------------------------------------------------------------------------------------------------------------ the method


class Sharpen(LogitsProcessor):
    """Sharpen the rows whose entropy is at least `delta`, for `model.generate(logits_processor=[...])`: (B, T) ids, (B, V) logits -> (B, V).

    With `compile` all rows go through one compiled function, meant for a GPU, where nobody has measured it yet; without, only those that
    need it. With `record`, `seen` gets 4 x B numbers per call: entropy before and after (nats), was the row adjusted, did any of
    its 50 most likely tokens but the first change places; and `seconds` adds up what the sharpening took. Raises ValueError for settings
    out of range and for nan in the logits.
    """

    def __init__(self, sharpen, delta, compile=False, record=False, **settings):
        sharpen(torch.zeros(1, 1), delta=delta, **settings)  # says so now, if a setting is out of range
        self.sharpen, self.settings, self.record = sharpen, dict(settings, delta=delta), record
        self.compiled = torch.compile(sharpen) if compile else None
        self.seen, self.kept, self.seconds = [], [], 0.0

    def keep(self, lengths):
        """Move to `kept` what was seen of each row's own tokens, given their number: after its end a row is fed padding."""
        seen = torch.stack(self.seen, -1)  # (4, B, T)
        own = torch.arange(seen.shape[-1], device=seen.device) < torch.tensor(lengths, device=seen.device)[:, None]
        self.kept.append(seen[:, own])  # (4, tokens)
        self.seen = []

    def __call__(self, input_ids, scores):
        started, scores = time.perf_counter(), scores.float()
        entropy = in_cache(token_entropy)(scores)  # (B,)
        if entropy.isnan().any():
            raise ValueError(f"{type(self).__name__}: the logits of row {entropy.isnan().nonzero()[0].item()} have nan or +inf in them at "
                             f"position {input_ids.shape[1]}; does the model overflow in its precision?")
        if self.compiled:
            after = self.compiled(scores, **self.settings)
        else:
            rows = (entropy >= self.settings["delta"]).nonzero()[:, 0]
            after = scores.index_copy(0, rows, self.sharpen(scores[rows], **self.settings))
        if self.record:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            places = scores.topk(min(50, scores.shape[-1]), -1).indices[:, 1:]
            swapped = (after.gather(-1, places).diff(dim=-1) > 1e-5).any(-1)  # inf - inf is nan, and so no swap
            adjusted = (after != scores).any(-1)
            self.seen.append(torch.stack([entropy, token_entropy(after), adjusted.float(), swapped.float()]))  # (4, B)
        return after


class EMInf(Sharpen):
    """EM-INF as a LogitsProcessor; the settings are those of `entropy.minimize_entropy`, released defaults."""

    def __init__(self, delta=0.3, lr=0.1, steps=3, kl_weight=0.05, optimizer="adam", **options):
        super().__init__(minimize_entropy, delta, lr=lr, steps=steps, kl_weight=kl_weight, optimizer=optimizer, **options)


class AdaptiveTemperature(Sharpen):
    """The paper's baseline as a LogitsProcessor; the settings are those of `entropy.adaptive_temperature`."""

    def __init__(self, alpha=0.5, delta=0.3, tau_min=0.01, tau_max=1.0, **options):
        super().__init__(adaptive_temperature, delta, alpha=alpha, tau_min=tau_min, tau_max=tau_max, **options)


if __name__ == "__main__":
    import eval as ev  # here, since eval.py imports the classes above

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the tiny model, with the settings under TINY)")
    parser.add_argument("--prompt", help="answer this, streamed, and end")
    parser.add_argument("--data", default="math500", help="problems: JSONL file or Hub name (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument("--show", type=int, default=3, help="problems to print side by side (default: %(default)s)")
    parser.add_argument("--decode", default=DECODERS, help="decoders of the table; NAME@T sets a temperature (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.1, help="of sampling, after EM-INF (default: %(default)s)")
    parser.add_argument("--delta", type=float, default=0.3, help="nats; a row stops under it (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="of the descent on the logits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="of the descent; 0: none (default: %(default)s)")
    parser.add_argument("--kl-weight", type=float, default=0.05, help="of KL(before || after) (default: %(default)s)")
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam", help="of the descent (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="of adaptive temperature, share of entropy to keep (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the descent: for a GPU; slow at the start")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to SEEDS (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=3072, help="longest response, tokens (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=2**16, help="tokens per generation batch (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    if parser.parse_args().model is None:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    try:
        device, dtype = ev.set_up(args.device)
        em_inf = EMInf(args.delta, args.lr, args.steps, args.kl_weight, args.optimizer, compile=args.compile, record=True)
        adaptive = AdaptiveTemperature(args.alpha, args.delta, compile=args.compile)
        decoders = args.decode.split(",")
        for name in decoders:
            ev.parse_decoder(name, args.temperature)
        problems = [] if args.prompt else ev.load_problems(args.data)[: args.limit]
        if any("answer" not in problem for problem in problems):
            raise ValueError(f"--data {args.data}: some of its problems have no answer to grade against")
        model, tokenizer = ev.load_model(args.model, device, dtype)
        prompt = ev.encode_prompt(tokenizer, args.prompt or problems[0]["prompt"])
        head = ev.output_head(model, prompt)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{NAME}: {error}")

    started = time.time()
    if args.prompt:
        torch.manual_seed(1)
        ev.generate(model, [prompt], ev.stop_ids(model, tokenizer), args.max_new_tokens, args.temperature, processors=[em_inf],
                    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    else:
        print(f"{args.model} on {len(problems)} problems of {args.data}, {device}", flush=True)
        results = ev.run_decoders(model, tokenizer, head, problems, decoders, args.seeds, args.max_new_tokens, args.budget, args.temperature,
                                  {"em-inf": lambda: em_inf, "adaptive-temperature": lambda: adaptive})
        for i, problem in enumerate(problems[: args.show]):
            print(f"\n{problem['prompt']}")
            for name, samples in results.items():
                print(f"  {name:23} {'right' if samples[i]['correct'] else 'wrong'}  {samples[i]['response']}")
        print("\n" + ev.table(results))
    if em_inf.kept:
        before, after, adjusted, swapped = torch.cat(em_inf.kept, -1).mean(-1).tolist()
        n = sum(kept.shape[-1] for kept in em_inf.kept)
        whole = time.time() - started if args.prompt else sum(s["seconds"] for name in results if "em-inf" in name for s in results[name])
        print(f"\nEM-INF: entropy {before:.3f} -> {after:.3f} nats over {n:,} tokens; {adjusted:.1%} of the steps adjusted, in {swapped:.1%} the order "
              f"of the tokens after the first changed; {1e6 * em_inf.seconds / n:.0f} microseconds per token, {em_inf.seconds / whole:.1%} of the time")
    print(f"{time.time() - started:.0f} s")
