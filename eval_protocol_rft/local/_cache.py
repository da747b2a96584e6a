"""A model and its caches of keys and values: those of the running batch, and those that turns of an
episode leave behind for the next, by the session's name.

Invariant: rows are right-aligned. Every row ends in the last cache column, a shorter row has
padding on its left that no query attends to, and positions count a row's own tokens from 0. So
rows of any length share one step, join between steps, and get the logits they would get alone.
A model whose state is more than keys and values is refused, never batched approximately.
Shapes: B rows, W cache columns, V vocabulary entries; a layer's keys are [B, heads, W, head_dim].

Invariant: what is kept was computed by the weights that sample now, and a prompt is given columns
of exactly the ids that it begins with; so keeping changes no token and, beyond float noise, no
logprob. What is kept has a bound; the session whose last turn ended longest ago goes first.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from eval_protocol_rft.local._draw import Request
from eval_protocol_rft.sampling import RefusedError


class LocalModel:
    """A causal language model, in evaluation mode, and the few facts that decide how it is sampled.

    Raises:
        RefusedError: it is recurrent or hybrid, or its config names no context length.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        config = module.config.get_text_config(decoder=True)
        cache_layers = DynamicCache(config=config).layers
        kinds = {type(layer) for layer in cache_layers}
        if not kinds or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no cache layers"
            raise RefusedError(
                f"{type(module).__name__} has {names}; local sampling batches plain attention "
                "caches only: serve this model with vLLM and sample over HTTP"
            )
        context_length = getattr(config, "max_position_embeddings", None)
        if not isinstance(context_length, int):
            raise RefusedError(
                f"the config of {type(module).__name__} has no max_position_embeddings, so its "
                "context length is unknown: set it on the config"
            )
        module.train(False)
        self.module = module
        self.layers = len(cache_layers)
        """Layers that keep keys and values."""
        self.vocab_size: int = config.vocab_size
        self.context_length = context_length
        """Most tokens that prompt and completion may have together."""
        self.skips_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
        """Whether the module can leave out the logits of all positions but the last."""

    @property
    def device(self) -> torch.device:
        return self.module.device

    def last_logits(self, ids_BQ: Tensor, lengths_B: Tensor, cache: Cache) -> Tensor:
        """[B, V] logits that follow the last of Q new right-aligned columns. `lengths_B` counts
        each row's tokens, new ones included; `cache` takes up the keys and values of the new."""
        new = ids_BQ.shape[1]
        width = cache.get_seq_length() + new
        column_W = torch.arange(width, device=ids_BQ.device)
        padding_B1 = (width - lengths_B).unsqueeze(1)
        options: dict[str, Any] = {"logits_to_keep": 1} if self.skips_logits else {}
        output = self.module(
            input_ids=ids_BQ,
            attention_mask=column_W >= padding_B1,
            position_ids=(column_W[-new:] - padding_B1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


@torch.no_grad()
def copy_weights(
    module: PreTrainedModel, weights: Mapping[str, Tensor], *, keep: Collection[str] = ()
) -> None:
    """Copy `weights` over those of `module`, all or none; those in `keep` may be missing.

    Raises:
        RefusedError: they are not this model's.
    """
    current = module.state_dict()
    shared = {value.data_ptr() for name, value in current.items() if name in weights}
    known = {*weights, *keep}
    missing = [n for n, v in current.items() if n not in known and v.data_ptr() not in shared]
    unknown = [name for name in weights if name not in current]
    misshapen = [n for n, v in weights.items() if n in current and v.shape != current[n].shape]
    for what, names in (("lack", missing), ("have unknown", unknown), ("misshape", misshapen)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RefusedError(f"the new weights {what} {names[0]}{more}: are they of this model?")
    for name, value in weights.items():
        current[name].copy_(value)


SPARE_COLUMNS = 16
"""Columns that a buffer has in reserve: the caches are copied at most once in so many steps, and
the reserve stays small beside a prompt."""

Columns = Sequence[tuple[Tensor, Tensor]]
"""One row's keys and values of each layer, [heads, T, head_dim] of T tokens, without padding."""


SMALL_MODEL_PARAMETERS = 20_000_000
"""Below this a step takes less time than waking a second torch thread saves."""


def spare_threads(model: torch.nn.Module) -> None:
    """Called by the thread that runs `model`: on one torch thread, if it is a small one. Torch
    applies the setting to this thread and to those that start later."""
    if sum(p.numel() for p in model.parameters()) < SMALL_MODEL_PARAMETERS:
        torch.set_num_threads(1)


class Joining(NamedTuple):
    """A request that joins the batch, and what an earlier one computed of its prompt's start."""

    request: Request
    known: int = 0
    """Tokens of the prompt, fewer than it has, that the first columns are of."""
    columns: Columns = ()

    @property
    def new(self) -> int:
        """Tokens of the prompt that must be run."""
        return len(self.request.prompt_ids) - self.known


class Batch:
    """B rows in the middle of sampling: their caches and how long each one is."""

    def __init__(self, model: LocalModel, layers: Sequence[_Layer], lengths_B: Tensor) -> None:
        self._model = model
        self._layers = layers
        self._cache = Cache(layers=list(layers))
        self._lengths_B = lengths_B
        """[B] tokens of each row that are in the caches, on the model's device."""

    def __len__(self) -> int:
        return len(self._lengths_B)

    @property
    def device(self) -> torch.device:
        return self._lengths_B.device

    @classmethod
    def prefill(cls, model: LocalModel, joining: Sequence[Joining]) -> tuple[Batch, Tensor]:
        """Run prompts of any lengths; return their batch and the [B, V] logits that follow them.

        Where something is known of every prompt, only the last Q columns are run, Q being the most
        that a prompt needs. Each row then takes up what it has on their left, known or not needed:
        a prompt of up to Q tokens is run as a whole.
        """
        prompts = [one.request.prompt_ids for one in joining]
        new = max(one.new for one in joining)
        ids_BQ = torch.tensor([[0] * (new - len(p)) + [*p[-new:]] for p in prompts])
        lengths_B = torch.tensor([len(p) for p in prompts], device=model.device)
        taken = [max(0, len(p) - new) for p in prompts]
        if any(taken):
            layers = _restore([one.columns for one in joining], taken, room=new)
        else:
            layers = [_layer() for _ in range(model.layers)]
        batch = cls(model, layers, lengths_B)
        return batch, model.last_logits(ids_BQ.to(model.device), lengths_B, batch._cache)

    def columns(self, row: int, length: int) -> Columns:
        """Copies of a row's last `length` columns, which are its own if it has as many tokens."""
        return [
            (keys[row, :, -length:].clone(), values[row, :, -length:].clone())
            for keys, values in (layer.used for layer in self._layers)
        ]

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row; return the [B, V] logits that follow it."""
        self._lengths_B = self._lengths_B + 1
        return self._model.last_logits(tokens_B.unsqueeze(1), self._lengths_B, self._cache)

    def shrink(self, rows: Sequence[int]) -> list[int]:
        """Keep only `rows`, in place: rows from the end move into the gaps, and padding that all
        share goes. Returns, for each new place, the row that is there now."""
        count = len(rows)
        gaps = sorted(set(range(count)).difference(rows))
        movers = [row for row in rows if row >= count]
        order = list(range(count))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        self._lengths_B = self._lengths_B[torch.tensor(order, device=self.device)]
        width = int(self._lengths_B.max())
        to, source = (
            torch.tensor(places, dtype=torch.long, device=self.device) for places in (gaps, movers)
        )
        for layer in self._layers:
            layer.shrink(count, width, to, source)
        return order

    @classmethod
    def gather(cls, parts: Sequence[tuple[Batch, Sequence[int]]]) -> Batch:
        """A new batch of picked rows, in order; a row may be picked several times. Padding that
        all picked rows share is left behind."""
        model = parts[0][0]._model
        rows = [torch.tensor(picked, device=model.device) for _, picked in parts]
        lengths = [
            part._lengths_B.index_select(0, picked)
            for (part, _), picked in zip(parts, rows, strict=True)
        ]
        widths = [int(lengths_P.max()) for lengths_P in lengths]
        layers = []
        for sources in zip(*(part._layers for part, _ in parts), strict=True):
            buffers = [
                _stack([layer.used[kind] for layer in sources], rows, widths) for kind in (0, 1)
            ]
            layers.append(_layer(buffers, width=max(widths)))
        return cls(model, layers, torch.cat(lengths))


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]  # its base class hooks subclassing
    """One layer's keys and values: views into buffers with room on the right, so that a step
    writes one column where the base class would copy the whole cache."""

    used: list[Tensor]
    """Keys and values, padding included."""
    _buffers: list[Tensor]

    def hold(self, buffers: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Use the first `width` columns of `buffers`; return keys and values."""
        self._buffers = buffers
        self.used = [buffer[:, :, :width] for buffer in buffers]
        self.keys, self.values = keys, values = self.used
        return keys, values

    def shrink(self, count: int, width: int, to: Tensor, source: Tensor) -> None:
        """Copy rows `source` over rows `to`; keep the first `count` rows, the last `width` columns
        in use, and the room behind them."""
        first = self.used[0].shape[2] - width
        for buffer in self._buffers:
            buffer.index_copy_(0, to, buffer.index_select(0, source))
        self.hold([buffer[:count, :, first:] for buffer in self._buffers], width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; return all keys and all values."""
        states = [key_states, value_states]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self.hold(states, key_states.shape[2])
        width = self.used[0].shape[2]
        end = width + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [_buffer(new, len(new), end) for new in states]
            for buffer, used in zip(self._buffers, self.used, strict=True):
                buffer[:, :, :width] = used
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[:, :, width:end] = new
        return self.hold(self._buffers, end)


def _layer(buffers: list[Tensor] | None = None, *, width: int = 0) -> _Layer:
    layer = _Layer()  # type: ignore[no-untyped-call]
    if buffers is not None:
        layer.lazy_initialization(*buffers)
        layer.hold(buffers, width)
    return layer


def _stack(sources: Sequence[Tensor], rows: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """A buffer of the picked rows of all sources, right-aligned."""
    width = max(widths)
    target = _buffer(sources[0], sum(map(len, rows)), width)
    first = 0
    for source, picked, own_width in zip(sources, rows, widths, strict=True):
        block = target[first : first + len(picked)]
        # Zeros and not whatever lay in memory: a weight of 0 times NaN is NaN.
        block[:, :, : width - own_width] = 0
        picked_columns = source[:, :, source.shape[2] - own_width :]
        torch.index_select(picked_columns, 0, picked, out=block[:, :, width - own_width : width])
        first += len(picked)
    return target


def _restore(known: Sequence[Columns], taken: Sequence[int], *, room: int) -> list[_Layer]:
    """Layers of rows that have the first `taken` of their known columns, right-aligned, with room
    for as many columns as are run next."""
    width = max(taken)
    layers = []
    for rows in zip(*known, strict=True):
        buffers = []
        for sources in zip(*rows, strict=True):
            buffer = _buffer(sources[0].unsqueeze(0), len(sources), width + room)
            for row, source, count in zip(buffer, sources, taken, strict=True):
                row[:, : width - count] = 0
                row[:, width - count : width] = source[:, :count]
            buffers.append(buffer)
        layers.append(_layer(buffers, width=width))
    return layers


def _buffer(like: Tensor, rows: int, width: int) -> Tensor:
    _, heads, _, head_dim = like.shape
    return like.new_empty(rows, heads, width + SPARE_COLUMNS, head_dim)


KEPT_SHARE = 0.5
"""Of max_batch_tokens, in tokens that are kept. The batch counts every row at the longest one's
prompt and max_tokens; what rows really hold when they end is about half of that. So a batch that
ends as a whole finds room, and keeping adds at most half to the memory that sampling may take."""

SHORT_COLUMNS = 32
"""Prefills of fewer columns gain nothing from being run apart: the forward itself is the cost."""


class Prefixes:
    """The kept prefix of each session. Not safe for threads: the worker sees to that."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._kept: dict[str, tuple[tuple[int, ...], Columns]] = {}
        """Ids and their columns, by session; the one kept longest ago first."""

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are kept, of all sessions."""
        return self._tokens

    def joining(self, request: Request) -> Joining:
        """With what its prompt begins with, if that is kept.

        Only a prompt longer than what is kept continues it. A shorter one begins the episode anew:
        given the columns of a former run, it would not be sampled to the last bit as that was.
        """
        session = request.session
        if session is None or session not in self._kept:
            return Joining(request)
        ids, columns = self._kept[session]
        length = _common(ids, request.prompt_ids)
        return Joining(request, length, columns) if length else Joining(request)

    def fits(self, length: int) -> bool:
        """Whether so many tokens can be kept at all."""
        return length <= self._max_tokens

    def keep(self, session: str, ids: tuple[int, ...], columns: Columns) -> None:
        """Keep the `columns` of `ids`, which fit, in place of what the session had."""
        former, _ = self._kept.pop(session, ((), None))
        self._kept[session] = ids, columns
        self._tokens += len(ids) - len(former)
        while self._tokens > self._max_tokens:
            evicted, _ = self._kept.pop(next(iter(self._kept)))
            self._tokens -= len(evicted)

    def clear(self) -> None:
        """Forget everything: the weights change, or nobody samples any more."""
        self._kept.clear()
        self._tokens = 0


def prefill_groups(joining: Iterable[Joining]) -> list[list[Joining]]:
    """Those that are prefilled together. All rows of a prefill run as many columns as the one that
    knows least, so those that know something are grouped by powers of two of what is new: a row
    runs less than twice what it must, however much others know."""
    groups: defaultdict[int, list[Joining]] = defaultdict(list)
    for one in joining:
        size = (max(one.new, SHORT_COLUMNS) - 1).bit_length() if one.known else 0
        groups[size].append(one)
    return list(groups.values())


def _common(kept: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """How many ids at the beginning are the same; none if `prompt` is not the longer."""
    if len(prompt) <= len(kept):
        return 0
    if prompt[: len(kept)] == kept:
        return len(kept)
    pairs = enumerate(zip(kept, prompt, strict=False))
    return next(index for index, (a, b) in pairs if a != b)
