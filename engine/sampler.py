"""
Sample from a language model: prefill, one token, many tokens.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine.cache import GrowingLayer, next_logits, next_step
from entropy import batches, token_entropy
from tasks.errors import UserError

# Rows that have ended leave the batch. The host looks for them every so many tokens, and takes them
# out if at most this share of the rows is left. A GPU has to wait for each look, while rows that
# have ended cost it little.
ON_CPU, ON_GPU = (1, 1.0), (16, 0.5)


def prefill(model, prompts, N):
    """Run B prompts (token ids) through the model, once for all N responses to each: the logits
    of the next token (B*N, V), and the step that gives those of each token after it."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    ids = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(ids, batch_first=True, padding_side="left").to(model.device)
    place = torch.arange(ids.shape[1], device=model.device)
    mask = (place >= ids.shape[1] - lengths).long()  # from lengths: id 0 may be a token
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # the layer of a sliding window does not grow
            cache.layers[i] = GrowingLayer()
    logits = next_logits(model, cache, ids, mask, positions)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(N)  # B*N
    cache.reorder_cache(rows)  # despite its name: rows may be repeated
    return logits[rows], next_step(model, cache, mask[rows], positions[rows, -1:])


def one_token(logits, temperature, sharpen=None):
    """Draw the next token of b rows from their logits (b, V): -> ids (b, 1), and (3, b) in nats:
    the entropy, the token's log-prob and the mean log-prob over the vocabulary."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)  # greedy is scored at 1
    ids = draw(logits if sharpen is None else sharpen(logits), temperature)
    entropy, drawn = token_entropy(logprobs), logprobs.gather(-1, ids)[:, 0]
    return ids, torch.stack([entropy, drawn, logprobs.mean(-1)])


def draw(logits, temperature):
    """(b, V) -> (b, 1): the likeliest token at temperature 0, else a drawn one."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs = (logits / temperature).softmax(-1)
    if probs.device.type == "cpu" and probs.shape[1] > 1024:
        return draw_by_cdf(probs)
    # p_v / E_v is largest at v with probability p_v, if all E_v are drawn from Exponential(1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)


def draw_by_cdf(probs, size=128):
    """Draw the first token whose cumulative probability is above one uniform number: (b, 1).

    First the block of `size` tokens is drawn, then the token in it. What is cumulated is float64,
    so that rare tokens keep their share. On a CPU this takes a fifth of the time of `draw`'s
    exponentials, of which there are b x V, made by one thread.
    """
    b, V = probs.shape
    if V % size:
        probs = F.pad(probs, (0, -V % size))
    probs = probs.view(b, -1, size)
    ends = probs.sum(-1).double().cumsum(-1)  # of the blocks
    u = torch.rand(b, 1, dtype=torch.float64, device=probs.device) * ends[:, -1:]
    block = torch.searchsorted(ends, u, right=True).clamp(max=ends.shape[1] - 1)
    inside = probs[torch.arange(b)[:, None], block][:, 0].double().cumsum(-1)  # (b, size)
    u = u - F.pad(ends, (1, 0)).gather(1, block)
    u = u.minimum(inside[:, -1:] * (1 - 1e-15))  # the sums of a block differ by rounding
    return (block * size + torch.searchsorted(inside, u, right=True)).clamp(max=V - 1)  # of nan


@dataclass
class Rollout:
    """N responses to each of B prompts, a prompt's N side by side.

    The tensors are (B*N, T), with T the longest response: a row has its own tokens first, and
    zeros behind them. They are of softmax(logits / temperature), before anything sharpens it.
    """

    N: int  # responses to each prompt
    V: int  # tokens of the vocabulary
    responses: list  # of lists of token ids, which end with the stop token where there is one
    entropy: torch.Tensor  # of the distribution of each token, nats
    logprobs: torch.Tensor  # of each token, nats
    mean_logprobs: torch.Tensor  # mean over the vocabulary at each token, nats
    mask: torch.Tensor  # True where there is a token
    texts: list = None  # of the responses; em_rl.py fills these two in, for its rewards
    problems: list = None  # that the responses answer


@torch.no_grad()
def generate(
    model, prompts, stop, max_new_tokens, temperature=1.0, N=1, batch_size=128, sharpen=None,
    desc=None, streamer=None,
):
    """Sample N responses to each of B prompts (lists of token ids): -> Rollout.

    A response ends with the first token that is one of the stop ids, or without one at
    max_new_tokens (it is truncated). Temperature 0 is greedy. `sharpen` changes the logits
    (b, V) that are drawn from, before the temperature, and not what is scored. At most
    `batch_size` responses, or N, are sampled at once. A streamer of transformers gets the tokens
    of a single response as they come. Raises UserError where logits are not finite.
    """
    was_training = model.training
    model.eval()
    shape = len(prompts) * N, max_new_tokens
    tokens = torch.full(shape, -1, device=model.device)  # -1: no token
    scores = torch.zeros(3, *shape, device=model.device)  # as one_token gives them
    stop = torch.tensor(stop, device=model.device)
    look_every, most_left = ON_CPU if streamer or model.device.type == "cpu" else ON_GPU
    bar = tqdm(total=len(tokens), desc=desc, unit="response", leave=False, delay=5,
               disable=desc is None)
    for group in batches([len(p) for p in prompts], math.inf, count=max(1, batch_size // N)):
        logits, step = prefill(model, [prompts[i] for i in group], N)
        # of each row of the batch: its row of `tokens`, and whether it has drawn a stop id
        place = torch.tensor([i * N + k for i in group for k in range(N)], device=model.device)
        ended = torch.zeros(len(place), dtype=torch.bool, device=model.device)
        for t in range(max_new_tokens):
            ids, values = one_token(logits, temperature, sharpen)
            tokens[place, t], scores[:, place, t] = ids[:, 0], values
            ended |= torch.isin(ids[:, 0], stop)
            if streamer is not None:
                streamer.put(ids[:, 0].cpu())
            last = t + 1 == max_new_tokens
            if last or (t + 1) % look_every == 0:
                left = (~ended).nonzero()[:, 0]
                if not values[0].isfinite().all():
                    raise UserError(f"the logits are not finite at token {t + 1}: the model's "
                                    "weights are broken, or a run's --lr is too high")
                if last or len(left) == 0:
                    break
                bar.set_postfix_str(f"token {t + 1}", refresh=False)
                if len(left) < len(place) and len(left) <= most_left * len(place):
                    bar.update(len(place) - len(left))
                    step.keep(left)
                    place, ids, ended = place[left], ids[left], ended[left]
            logits = step(ids)
        bar.update(len(place))
    bar.close()
    if streamer is not None:
        streamer.end()
    model.train(was_training)
    stops = torch.isin(tokens, stop)
    mask = (tokens >= 0) & (stops.cumsum(1) - stops.long() == 0)  # none behind the first stop
    responses = [row[own].tolist() for row, own in zip(tokens.cpu(), mask.cpu())]
    T = mask.sum(1).max()
    mask, scores = mask[:, :T], scores[:, :, :T].masked_fill(~mask[:, :T], 0)
    return Rollout(N, logits.shape[-1], responses, *scores, mask)
