"""Packed execution: tokens of many sequences in one row, through the library's own model code.

Everything in a block but attention treats tokens one by one. So a row [1, T, D] may hold tokens of many sequences, if
each token has its own position and attention keeps the sequences apart. The library lets us register that attention,
and what stands for its mask, under a name that a config can ask for.
"""

# T all new tokens of a row, L new tokens of one piece, D hidden, P prompt tokens, N blocks or heads, H head dim

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import causal_mask_function

from swarm.errors import BadRequest, UnsupportedModel
from swarm.model import families
from swarm.model.attention import RowAttention
from swarm.model.edits import AddPrompt, Edits, make_edits
from swarm.model.graphs import graphed_blocks
from swarm.model.kv_store import KVStore, kv_layout, read_runs
from swarm.model.narrow import twin_of
from swarm.model.paged import PagedRow, Pager, open_pager
from swarm.model.passage import Passage
from swarm.model.pieces import FastPath, Piece, position_ids
from swarm.model.sights import MaskFunction
from swarm.model.singles import Scores
from swarm.model.span import Span
from swarm.model.span_cache import cache_layers
from swarm.model.staging import send
from swarm.model.whole_blocks import whole_blocks

__all__ = ["PackedSpan", "Piece", "is_packable"]

logger = logging.getLogger(__name__)

IMPLEMENTATION = "swarm_packed"
"""The name under which a config asks for the functions below."""


def is_packable(span: Span) -> bool:
    """Whether this span can run packed; if not, run one session at a time with `span.new_cache`.

    A config can ask for more than its type usually does (masks of its own, say), so two tokens are run.
    """
    if span.anatomy.model_type not in families.PACKABLE or not span.takes_position_ids:
        return False
    if any(type(layer) is not DynamicLayer for layer in cache_layers(span.config)):
        return False
    x_TD = torch.zeros(2, span.hidden_size, dtype=span.dtype, device=span.device)
    try:
        PackedSpan(span, KVStore(kv_layout(span), 2)).by_modules(x_TD, [Piece(1, 0, [(0, 1)]), Piece(1, 0, [(1, 2)])])
    except UnsupportedModel as exc:
        logger.warning("sessions run one at a time: %s", exc)
        return False
    return True


class PackedSpan:
    """A twin of a span that runs pieces of many sequences in one row, over the same weights.

    The span itself is left as it is. Making a twin takes milliseconds: keep one per view (see narrow.SpanViews).
    Calls may nest, also inside those of the span itself. Not differentiable.
    """

    def __init__(self, span: Span, store: KVStore) -> None:
        """Raises: BadRequest: the store has no memory for some of the blocks."""
        if not store.layout.blocks.covers(span.blocks):
            raise BadRequest(f"the store is for the blocks {store.layout.blocks}, not {span.blocks}")
        AttentionInterface.register(IMPLEMENTATION, _attend)
        AttentionMaskInterface.register(IMPLEMENTATION, _make_mask)
        model = twin_of(span.model, _Configs().twin_of)
        self._span = span
        self._dtype = span.dtype  # which the library looks for among all parameters, each time
        self._store = store
        layers = model.get_submodule(span.anatomy.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        """The twins of the span's blocks: modules of their own, without its hooks."""
        num_heads = getattr(span.config, "num_attention_heads", None)
        pager = open_pager(store, num_heads) if num_heads else None
        self.rows = _Rows(Passage(model, layers), span, store, pager)
        """Runs rows by the library's modules."""
        fast_paths = (whole_blocks(span, model, layers, store), graphed_blocks(span, store, pager, self.rows.over))
        self.fast_paths: list[FastPath] = [path for path in fast_paths if path is not None]
        """Ways for rows of some kinds that take less time; the first one that takes a row has it."""

    def __call__(self, x_TD: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Run the blocks on all pieces and write their keys and values into the store.

        Args:
            x_TD: hidden states entering the first block, those of the first piece first, on the span's device or on
                the CPU, from where they travel together with what else the device needs.
            pieces: at most one per sequence; no two may write the same slot.
        Returns: hidden states leaving the last block, [T, D], in the span's dtype and on its device, in that order.
        Raises:
            BadRequest: shapes do not fit.
            UnsupportedModel: the model's attention is not as it was taken to be.
            A call that fails may have written the new slots, and no others.
        """
        self._check(x_TD, pieces)
        with torch.inference_mode():
            edits = make_edits(_prompt_adder(pieces), [(piece.length, piece.adapters) for piece in pieces])
            for path in self.fast_paths if edits is None else ():
                if path.takes(pieces):
                    return path(x_TD.to(self._dtype), position_ids(pieces).unsqueeze(0), pieces)
            return self.by_modules(x_TD, pieces, edits)

    def by_modules(self, x_TD: Tensor, pieces: Sequence[Piece], edits: Edits | None = None) -> Tensor:
        """The same by the library's modules, whatever the pieces are; `edits`: what is changed in the blocks."""
        with torch.inference_mode():
            return self.rows.of_pieces(x_TD.to(self._dtype), pieces, edits)

    def _check(self, x_TD: Tensor, pieces: Sequence[Piece]) -> None:
        hidden_size, num_blocks = self._span.hidden_size, len(self._span.blocks)
        num_tokens = sum(piece.length for piece in pieces)
        if not pieces or x_TD.shape != (num_tokens, hidden_size):
            raise BadRequest(f"hidden states must be {[num_tokens, hidden_size]}, not {list(x_TD.shape)}")
        for piece in pieces:
            piece.check(self._store.num_slots, num_blocks, hidden_size)


class _Configs:
    """The configs of a twin: those of the model, but for the attention that they ask for."""

    def __init__(self) -> None:
        self._pairs: list[tuple[PretrainedConfig, PretrainedConfig]] = []

    def twin_of(self, config: PretrainedConfig) -> PretrainedConfig:
        for original, twin in self._pairs:
            if original is config:
                return twin
        twin = copy.deepcopy(config)  # deep, for configs within it are told the implementation as well
        twin._attn_implementation = IMPLEMENTATION
        self._pairs.append((config, twin))
        return twin


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Runs rows through the library's modules."""

    passage: Passage
    span: Span
    store: KVStore
    pager: Pager | None

    def over(self, store: KVStore, pager: Pager | None) -> _Rows:
        """The same over another store."""
        return dataclasses.replace(self, store=store, pager=pager)

    def of_pieces(self, x_TD: Tensor, pieces: Sequence[Piece], edits: Edits | None = None) -> Tensor:
        """See PackedSpan.by_modules."""
        planned = None if self.pager is None or self._expands else self.pager.plan(pieces)
        slots = itertools.chain.from_iterable(piece.slots_from(piece.position) for piece in pieces)
        tensors = [x_TD, position_ids(pieces), torch.tensor(list(slots)), *(planned.tensors if planned else ())]
        x_TD, position_ids_T, slots_T, *rest = send(tensors, self.store.layout.device)
        paged = None if planned is None else planned.with_tensors(rest)
        return self._run(x_TD, position_ids_T, _Row(pieces, self.store, self.span, slots_T, paged), edits)

    def of_single_tokens(self, x_TD: Tensor, position_ids_T: Tensor, slots_T: Tensor, paged: PagedRow) -> Tensor:
        """Run a row that is in tensors on the device, and in them alone; see graphs.RunTokens."""
        return self._run(x_TD, position_ids_T, _Row(None, self.store, self.span, slots_T, paged), None)

    @property
    def _expands(self) -> bool:
        return self.span.anatomy.model_type in families.EXPANDED

    def _run(self, x_TD: Tensor, position_ids_T: Tensor, row: _Row, edits: Edits | None) -> Tensor:
        inputs: dict[str, Any] = {"use_cache": True, "past_key_values": row}
        if self.span.takes_position_ids:
            inputs["position_ids"] = position_ids_T.unsqueeze(0)
        with row.running():
            return self.passage(x_TD.unsqueeze(0), inputs, edits)[0]


class _Row(Cache):
    """What one call needs in every block. To the library it is the cache: the place where new keys and values go."""

    def __init__(
        self,
        pieces: Sequence[Piece] | None,
        store: KVStore,
        span: Span,
        slots_T: Tensor,
        paged: PagedRow | None,
    ) -> None:
        """A row of None for `pieces` is all in tensors, so that it can be run again with other numbers in them."""
        super().__init__(layers=[])
        self.store = store
        self.paged = paged
        self.expands = span.anatomy.model_type in families.EXPANDED
        self._runs = [run for piece in pieces or () for run in piece.runs]
        self._pieces = _end_to_end(pieces) if self.expands and pieces is not None else pieces
        self._blocks = span.blocks
        self._slots_T = slots_T
        self._written: tuple[int, Tensor, Tensor] | None = None

    @property
    def pieces(self) -> Sequence[Piece]:
        """Raises: UnsupportedModel: this row has none, only what the kernel that reads pages needs."""
        if self._pieces is None:
            raise UnsupportedModel("this model's attention needs more than the kernel that reads pages has")
        return self._pieces

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let this be the row that the functions below work for."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @cached_property
    def causal(self) -> _Mask:
        """For attention that is given no mask."""
        return _Mask(self, None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        number = self._blocks.start + layer_idx
        self.store.write(number, self._slots_T, key_states, value_states)
        if self.expands:
            keys, values = self.store.heads(number)
            return read_runs(keys, self._runs), read_runs(values, self._runs)
        self._written = number, key_states, value_states
        return key_states, value_states

    def heads(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the runs of `pieces` are in: the keys and values of the block whose new ones these are, or, if the model
        makes them from something smaller, what it has made from all that the store holds of these sequences."""
        if self.expands:
            return keys, values
        number, new_keys, new_values = self._written or (0, None, None)
        if keys is not new_keys or values is not new_values:
            raise UnsupportedModel("this model's attention changes keys and values after they went into the cache")
        return self.store.heads(number)

    # What the library's mask and position code asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self._blocks)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self._blocks)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self._blocks)


_running: ContextVar[_Row] = ContextVar("running packed row")
"""Set during a call: the library hands our functions the config and the module, but nothing of the call."""


class _Mask:
    """What the library passes from where it makes masks to attention: what is seen, and how that is computed."""

    def __init__(self, row: _Row, mask_function: MaskFunction | None, local_size: int | None) -> None:
        self._row = row
        self._function = mask_function
        self._local_size = local_size

    @cached_property
    def _paged(self) -> PagedRow | None:
        """None: the kernel that reads pages is not there, or has no such mask."""
        return self._row.paged if self._function is None or self._window is not None else None

    @cached_property
    def _window(self) -> int | None:
        """How many tokens each one sees, itself included, if this mask is a window; asked of masks with a function."""
        assert self._function is not None
        is_window = self._local_size is not None and _is_window(self._function, self._local_size)
        return self._local_size if is_window else None

    @cached_property
    def _attention(self) -> RowAttention:
        return RowAttention(self._row.pieces, self._function, self._row.store)

    @cached_property
    def _rest(self) -> RowAttention:
        """Of the pieces that lie on no pages."""
        assert self._paged is not None
        return RowAttention(self._paged.rest, self._function, self._row.store)

    def attend(self, q_1NTH: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        if not scores.plain or self._paged is None:
            return self._attention(q_1NTH, keys, values, scores)
        window = None if self._function is None else self._window

        def attend_rest(q_1NTH: Tensor) -> Tensor:
            return self._rest(q_1NTH, keys, values, scores)

        return self._paged.attend(q_1NTH, keys, values, scores.scaling, window, attend_rest)


def _is_window(function: MaskFunction, size: int) -> bool:
    """Whether a mask function of that local size is a sliding window, rather than chunks.

    It is asked on the CPU, so that nobody waits for the device. What a chunk does depends on padding that the library
    looks up on the device: where that is another one, the answer betrays it.
    """
    zero = torch.zeros((), dtype=torch.int64)
    sees = [function(zero, zero, zero + size, zero + key) for key in (0, 1)]
    if any(each.device.type != "cpu" for each in sees):
        return False
    return size == 1 or [bool(each) for each in sees] == [False, True]


def _make_mask(
    *,
    mask_function: MaskFunction = causal_mask_function,
    local_size: int | None = None,
    use_vmap: bool = False,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> _Mask:
    """Our entry among the library's makers of masks."""
    if use_vmap or not (attention_mask is None or bool(attention_mask.all())):
        raise UnsupportedModel("this model has masks of its own, which cannot be told apart by sequence")
    return _Mask(_running.get(), None if mask_function is causal_mask_function else mask_function, local_size)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Our entry among the library's implementations of attention."""
    row = _running.get()
    mask = row.causal if attention_mask is None else attention_mask
    if not isinstance(mask, _Mask) or position_bias is not None:
        raise UnsupportedModel("this model changes its masks, or adds to its scores what depends on positions")
    keys, values = row.heads(key, value)
    return mask.attend(query, keys, values, Scores(scaling, softcap, s_aux)), None


def _end_to_end(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces over a tensor that holds the tokens of their sequences one after the other."""
    ends = itertools.accumulate(piece.num_keys for piece in pieces)
    return [
        dataclasses.replace(piece, runs=[(end - piece.num_keys, end)]) for piece, end in zip(pieces, ends, strict=True)
    ]


def _prompt_adder(pieces: Sequence[Piece]) -> AddPrompt | None:
    """What adds the deep prompts of a block to the tokens that stand at their positions."""
    parts: list[tuple[int, int, Piece]] = []
    start = 0
    for piece in pieces:
        if piece.prompts_NPD is not None:
            length = min(piece.length, piece.prompts_NPD.shape[1] - piece.position)
            if length > 0:
                parts.append((start, length, piece))
        start += piece.length

    def add_prompt(x_1TD: Tensor, index: int) -> Tensor:
        x_1TD = x_1TD.clone()
        for start, length, piece in parts:
            assert piece.prompts_NPD is not None
            x_1TD[0, start : start + length] += piece.prompts_NPD[index, piece.position : piece.position + length]
        return x_1TD

    return add_prompt if parts else None
