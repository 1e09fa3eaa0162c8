"""
What a model can't do is said in one line, before work starts.

A model can be used if its logits are an output head on its last hidden states, if it takes
position ids, and if it goes on from a DynamicCache: most decoders of transformers are such.
"""
import torch
from transformers import DynamicCache

from engine.cache import cache_name
from engine.sampler import generate
from entropy import output_head, score_all
from tasks.errors import UserError, one_line


def check_model(model, prompts, max_new_tokens, training=False):
    """Raise UserError where the model can't answer the prompts (lists of token ids) with
    `max_new_tokens`, or can't be sampled from and scored, in train mode if it is for training."""
    check_tokens(model, prompts)
    check_length(model, max(len(prompt) for prompt in prompts), max_new_tokens)
    check_class(model, prompts[0][:64], max_new_tokens, training)  # a few tokens are enough


def check_tokens(model, prompts):
    """A tokenizer may have tokens for which the model has no embedding, or none at all: of a
    folder without its files transformers makes an empty one."""
    if not all(prompts):
        raise UserError(f"model {model.name_or_path}: a prompt has no tokens; are the tokenizer's "
                        "files in the model's folder?")
    known = len(model.get_input_embeddings().weight)
    highest = max(max(prompt) for prompt in prompts)
    if highest >= known:
        raise UserError(f"model {model.name_or_path}: token {highest} is in a prompt, and the "
                        f"model has only {known:,} embeddings; its tokenizer is another model's")


def check_length(model, longest, max_new_tokens):
    """A model with an embedding for each position has no more positions. A rope that changes with
    the length changes for all tokens, but the keys in the cache stay as they were. Any other
    rope has no limit, but the model was not trained beyond max_position_embeddings."""
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None) or torch.inf
    limit = min(trained if has_position_table(model, trained) else torch.inf, rope_limit(config))
    tokens = longest + max_new_tokens
    asked = f"prompts of up to {longest:,} tokens and --max-new-tokens {max_new_tokens}"
    way_out = "give a smaller --max-new-tokens or, in training, --max-prompt-tokens"
    if tokens > limit:
        raise UserError(f"{asked} make {tokens:,}, and {type(model).__name__} can't go beyond "
                        f"{limit:,} tokens; {way_out}")
    if tokens > trained:
        print(f"warning: {asked} make {tokens:,}, and the model was trained on at most "
              f"{trained:,}; {way_out}")


def has_position_table(model, rows):
    """Has the model a matrix with a row for each position? OPT's has two more."""
    tables = list(model.buffers())
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings():
            tables.append(module.weight)
    return any(table.dim() == 2 and rows <= len(table) <= rows + 2 for table in tables)


def rope_limit(config):
    """Tokens at which a rope changes for all positions: long rope, and dynamic NTK."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [torch.inf]
    for part in [rope, *rope.values()]:  # some models have one for each kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind == "longrope":
            limits.append(part["original_max_position_embeddings"])
        if kind == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits)


def check_class(model, prompt, max_new_tokens, training):
    """Does the forward take what the sampler and the scorer give it, and do they agree?"""
    name = type(model).__name__
    ids = torch.tensor([(prompt * 8)[:8]], device=model.device)
    cache = DynamicCache(config=model.config)
    try:  # transformers' code alone, so what it raises is no fault of ours
        with torch.no_grad():
            model(input_ids=ids[:, :7], use_cache=True, **{cache_name(model): cache})
            model(input_ids=ids[:, 7:], use_cache=True, **{cache_name(model): cache})
        length = cache.get_seq_length()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"{name}: models of this class are not supported, since they do not go on "
                        f"from a DynamicCache ({one_line(error)})") from error
    try:
        head = output_head(model, prompt)
    except ValueError as error:
        raise UserError(f"{error}; models of this class are not supported") from error
    if length != 8:
        raise UserError(f"{name}: models of this class are not supported, since they do not use "
                        "a DynamicCache")
    pair = [prompt, prompt[len(prompt) // 2 :]]  # the second one is padded
    gap = sampler_gap(model, head, pair, [], min(max_new_tokens, 8), training=training)
    if not gap <= (0.01 if model.dtype == torch.float32 else 0.3):
        raise UserError(f"{name}: models of this class are not supported, since log-probs of the "
                        f"sampler and the scorer differ by {gap:.2g} nats a token"
                        + ("; try --no-graph" if model.device.type == "cuda" else ""))


def sampler_gap(model, head, prompts, stop, max_new_tokens, temperature=1.0, training=True):
    """Mean |difference| in nats between the log-probs that the sampler and the scorer give to
    drawn tokens: rounding in float32, a few hundredths in bfloat16, and a bug if it is more.

    `training` scores in train mode, in which gradients are taken. The sampler is in eval mode.
    """
    was_training = model.training
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        rollout = generate(model, prompts, stop, max_new_tokens, temperature, N=2)
        model.train(training)
        twice = [prompt for prompt in prompts for _ in range(2)]
        scored = score_all(model, head, twice, rollout.responses, temperature)
    model.train(was_training)
    return (rollout.logprobs - scored.logprobs)[scored.mask].abs().mean().item()
