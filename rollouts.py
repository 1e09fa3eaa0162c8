"""
Rollouts for training: by `model.generate`, or with a paged KV cache by transformers' continuous batching; and are they what the trainer scores?
"""
import collections
import math
import warnings

import torch
from tqdm import tqdm
from transformers import ContinuousBatchingConfig
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from eval import RANK, WORLD, gather, generate, sampling_config


def choose(how, device, dtype):
    """"generate" or "paged", as asked or, where `how` is None, paged where FlashAttention works, on a GPU and with 16-bit weights: without
    it every token would be masked against every other's cache."""
    fast = device.startswith("cuda") and dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0)
    return how or ("paged" if fast and (is_flash_attn_2_available() or is_kernels_available()) else "generate")


def roll_out(how, model, prompts, stop, max_new_tokens, temperature, budget, desc=None):
    """Sample a response to each prompt -> (responses, the log-probs that their tokens were sampled with), lists of lists. `budget` is
    `generate`'s; torchrun's processes share the work."""
    logprobs = []
    if how == "generate":
        return generate(model, prompts, stop, max_new_tokens, temperature, budget, desc, logprobs=logprobs), logprobs
    place = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # a prompt's rollouts stay together
    mine = [i for i, prompt in enumerate(prompts) if place[tuple(prompt)] % WORLD == RANK]
    responses = generate_paged(model, [prompts[i] for i in mine], stop, max_new_tokens, temperature, desc, logprobs=logprobs)
    results = gather(dict(zip(mine, zip(responses, logprobs))))
    return [results[i][0] for i in range(len(prompts))], [results[i][1] for i in range(len(prompts))]


@torch.no_grad()
def generate_paged(model, prompts, stop, max_new_tokens, temperature=1.0, desc=None, memory=0.7, logprobs=None):
    """`generate` by transformers' continuous batching: same arguments and results, other random numbers.

    A response that ends makes room for the next in the running batch, the KV cache is paged, and where every prompt stands there N times
    its KV cache is computed once and shared. On a GPU with FlashAttention (the flash-attn or the kernels package) and 16-bit weights
    it decodes with CUDA graphs; without, there are none, and every token is masked against every other's cache (and CPU batches are small).
    It samples in a thread that sees no autocast, so the weights must be in the precision that they are scored in.

    `memory`: share of the device's free memory that cache and buffers may take; they are freed at the end. Like `generate` it starts from
    the global random state, from which it draws one number; on a CPU the same state gives the same responses. Torch's random states,
    train mode, attention implementation and generation_config are as before afterwards, after an exception too. Raises
    RuntimeError where transformers can't start, fails on a response or loses one; no partial results.
    """
    seed = torch.randint(2**31, ()).item() + RANK
    if not prompts:
        return []
    counts = collections.Counter(map(tuple, prompts))
    shared = math.gcd(*counts.values()) if temperature > 0 and min(map(len, counts)) > 1 else 1  # forks before a prompt's last token
    jobs = [list(prompt) for prompt, count in counts.items() for _ in range(count // shared)]
    config = sampling_config(stop, max_new_tokens, temperature, num_return_sequences=shared)
    was_training, attention, on_gpu = model.training, model.config._attn_implementation, model.device.type == "cuda"
    outputs, manager = {}, None
    bar = tqdm(total=len(prompts), desc=desc, unit="response", leave=False, delay=5, disable=desc is None or RANK > 0)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # transformers seeds the global generators
        paging = ContinuousBatchingConfig(seed=seed, return_logprobs=logprobs is not None, max_memory_percent=memory,
                                          max_requests_per_batch=min(len(prompts), 1024 if on_gpu else 64),
                                          auto_switch_to_flash=on_gpu and model.dtype != torch.float32)
        if not on_gpu:  # small batches: every token is masked against every other's cache
            paging.max_batch_tokens = 512
            paging.num_blocks = 64 * -(-(max(map(len, prompts)) + max_new_tokens) // paging.page_size)
        try:
            try:
                manager = model.init_continuous_batching(config, paging)
                if "flash" not in model.config._attn_implementation:
                    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
                        raise ValueError("without FlashAttention it leaves out this model's soft cap on attention")
                    if on_gpu:
                        warnings.warn("paged rollouts without FlashAttention (the flash-attn or the kernels package, and 16-bit weights): "
                                      "no CUDA graphs, and every token is masked against every other's cache")
                manager.warmup()
            except (RuntimeError, ValueError, MemoryError) as error:
                raise RuntimeError(f"transformers' continuous batching can't start: {error}; try another share of the memory (now "
                                   f"{memory}) or --rollouts-with generate") from error
            # generate_batch starts its thread first: which prompts meet in the first batch, and so what is sampled, could depend on timing
            manager.add_requests(jobs, max_new_tokens=max_new_tokens)
            manager.start()
            while len(outputs) < len(prompts):
                running = manager.is_running()  # asked first: what it leaves behind when it ends is still read
                output = manager.get_result(timeout=1)
                if output is None and not running:
                    raise RuntimeError(f"transformers' continuous batching stopped after {len(outputs)} of {len(prompts)} responses; see "
                                       "its messages above, or use --rollouts-with generate")
                if output is not None and output.error is not None:
                    i = next((i for i, prompt in enumerate(prompts) if list(prompt) == list(output.prompt_ids)), "unknown")
                    raise RuntimeError(f"transformers' continuous batching failed on a response to prompt {i}: {output.error}; try less "
                                       f"memory (now {memory}) or --rollouts-with generate")
                if output is not None and output.is_finished():
                    outputs[output.request_id] = output
                    bar.update()
        finally:
            bar.close()
            if manager is not None:
                manager.stop(hard_stop=True)  # waits for the step under way
                manager.destroy()
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            model.train(was_training)
    own = collections.defaultdict(list)
    for name in sorted(outputs, reverse=True):  # by name: in the order in which they came, a prompt's short ones would be first
        own[tuple(outputs[name].prompt_ids)].append(outputs[name])
    try:
        ordered = [own[tuple(prompt)].pop() for prompt in prompts]
    except IndexError:
        raise RuntimeError("transformers' continuous batching answered other prompts than asked: --rollouts-with generate") from None
    if logprobs is not None:
        logprobs[:] = [output.logprobs for output in ordered]
    return [output.generated_tokens for output in ordered]


def sampler_gap(sampled, logprobs, mask):
    """Mean absolute difference (nats) between the sampler's log-probs (lists of floats) and the trainer's, over all response tokens:
    `logprobs` and `mask` are `score`'s, (B, T)."""
    sampled = torch.tensor([x for row in sampled for x in row], device=logprobs.device)  # (tokens,), in the mask's order
    return (logprobs[mask].float() - sampled).abs().mean().item()
