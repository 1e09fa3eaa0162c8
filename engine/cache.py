"""
The next token's logits, from a cache of keys and values.

`Growing` is a cache that gets longer with each token: it works with every kind of layer, and on
every device. `Static` keeps shapes and addresses as they are, so that a CUDA graph can replay a
token. A token of a 7B model is many small kernels, which the host starts one by one: on an H200
that took 28 ms for 64 rows and 35 for 256, where reading all the weights takes 3.2 ms. A graph is
recorded once, and starts them all at once. (What it gains has not been measured yet.)
"""
import inspect

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from tasks.errors import UserError

ROOM = 512  # places for keys that a static cache gets at once
use_graphs = True  # --no-graph sets it to False


def next_logits(model, cache, ids, mask, positions):
    """Run the model on ids (b, t) behind what `cache` holds: logits of the next token (b, V)."""
    # A tensor of positions copies a prompt's last hidden states, where 1 would take a slice. To
    # multiply a slice with frozen weights (V, D), as adapters have, a CPU makes b copies of these.
    t = ids.shape[1]
    last = 1 if t == 1 else torch.tensor([t - 1], device=ids.device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=last,
        **{cache_name(model): cache},
    )
    return output.logits[:, -1].float()


def cache_name(model):
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24


def next_step(model, cache, mask, positions):
    """What runs the model on one more token: Static on a GPU, where the model allows it."""
    if use_graphs and model.device.type == "cuda" and can_be_static(model, cache):
        return Static(model, cache, mask, positions)
    return Growing(model, cache, mask, positions)


def can_be_static(model, cache):
    """Have all layers plain attention, which takes the mask as it is, and no step on the host?"""
    plain = all(type(layer) is GrowingLayer for layer in cache.layers)
    takes_mask = model.config._attn_implementation in ("sdpa", "eager")
    return plain and takes_mask and model._can_compile_fullgraph


class Growing:
    """A cache, the attention mask (b, t) and the last position (b, 1) of each of b rows."""

    def __init__(self, model, cache, mask, positions):
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions

    def __call__(self, ids):
        """Run the model on the next token (b, 1) of each row: logits (b, V)."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        return next_logits(self.model, self.cache, ids, self.mask, self.positions)

    def keep(self, rows):
        """Go on with some of the rows alone."""
        self.cache.reorder_cache(rows)  # despite its name: rows may be left out, or repeated
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room to grow. transformers' own layer copies
    all of itself at every token: at 64 rows x 1,024 tokens that took 1.5 times as long."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = self.key_room = keys[:, :, :0]
            self.values = self.value_room = values[:, :, :0]
        self.key_room, self.keys = append(self.key_room, self.keys, keys)
        self.value_room, self.values = append(self.value_room, self.values, values)
        return self.keys, self.values

    def reorder_cache(self, rows):
        super().reorder_cache(rows)  # makes copies, in which there is no room
        self.key_room, self.value_room = self.keys, self.values


def append(room, old, new):
    """Put `new` (b, heads, t, D) behind `old` in its buffer `room`: (room, a view of both)."""
    start = old.shape[-2]
    end = start + new.shape[-2]
    if room.shape[-2] < end:  # full
        room = new.new_empty(*new.shape[:2], end + 256, new.shape[-1])
        room[:, :, :start] = old
    room[:, :, start:end] = new
    return room, room[:, :, :end]


class Static:
    """As Growing, but each layer's keys and values are in tensors that hold places to come.

    A row attends to the whole room. A mask (b, 1, 1, room), added to the scores of attention,
    hides the padding and the places to come. A graph reads and writes the addresses that it was
    recorded with, so a token's ids, position and mask are written into the same tensors.
    """

    def __init__(self, model, cache, mask, positions):
        self.model, self.cache = model, cache
        self.used = mask.shape[1]  # places, by the host's own count
        self.place = torch.tensor([self.used - 1], device=model.device)  # of the last token
        self.hidden = torch.finfo(model.dtype).min
        self.mask = (1 - mask[:, None, None]).to(model.dtype) * self.hidden
        self.positions, self.ids = positions.clone(), torch.zeros_like(positions)
        cache.layers = [StaticLayer(layer, self.place) for layer in cache.layers]
        self.graph, self.recorded = None, False

    def __call__(self, ids):
        if self.used == self.mask.shape[-1]:
            self.widen()
        self.used += 1
        self.place += 1
        self.positions += 1
        self.ids.copy_(ids)
        self.mask.index_fill_(-1, self.place, 0)
        if self.model.device.type != "cuda":  # in tests
            return self.run()
        if not self.recorded:
            self.record()
        self.graph.replay()
        return self.logits  # until the next replay

    def run(self):
        return next_logits(self.model, self.cache, self.ids, self.mask, self.positions)

    def widen(self):
        self.recorded = False
        self.mask = F.pad(self.mask, (0, ROOM), value=self.hidden)
        for layer in self.cache.layers:
            layer.keys = F.pad(layer.keys, (0, 0, 0, ROOM))
            layer.values = F.pad(layer.values, (0, 0, 0, ROOM))

    def keep(self, rows):
        self.recorded = False
        self.cache.reorder_cache(rows)
        self.mask, self.positions, self.ids = self.mask[rows], self.positions[rows], self.ids[rows]

    def record(self):
        """Record `run` as a graph. It has to warm up before; each run writes the same keys."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        # the graph before leaves its memory to this one, and must be alive until then
        graph, pool = torch.cuda.CUDAGraph(), self.graph and self.graph.pool()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.logits = self.run()
        except RuntimeError as error:
            raise UserError(f"{type(self.model).__name__}: a token can't be recorded as a CUDA "
                            "graph; --no-graph does without") from error
        self.graph, self.recorded = graph, True


class StaticLayer(DynamicLayer):
    """Keys and values (b, heads, room, D) of a layer. `place`, a tensor (1,), is where the next
    token's are written."""

    def __init__(self, layer, place):
        super().__init__()
        self.keys, self.values, self.place = layer.keys, layer.values, place
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values
