"""A few tokens through whole blocks in one call of a compiled kernel (kernels/blocks.c), for models built as Llama is.

Between its products a block does little, but in some fifteen small operations, and calling those takes longer than
computing them. Whether a block is what the kernel computes is found out when it is loaded, by running both.
"""

# T tokens, D hidden, N key/value heads, G query heads of each, H head dim, S slots

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from swarm.model import families, kernels
from swarm.model.half_layers import HalfLinear, HalfNorm
from swarm.model.kv_store import KVLayout, KVStore
from swarm.model.narrow import twin_of
from swarm.model.pieces import Piece
from swarm.model.singles import HEAD_COLUMNS
from swarm.model.span import Span
from swarm.model.weight_only import CpuLinear
from swarm.ranges import BlockRange

logger = logging.getLogger(__name__)

MOST_TOKENS = 31
"""With more of them the way to each product no longer counts."""

MOST_SCORES = 1 << 16
"""With more pairs of a token and a key, of sequences that have several tokens, torch's attention is made for that."""

_LINEAR = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_SAME_ROWS = (("q", "k", "v"), ("gate", "up"))

_SILU = (nn.SiLU, type(ACT2FN["silu"]))

_ALLOWED_ERROR = 0.02
"""How far what the kernel adds to the hidden states may be from what the library does, relative to it: both round to
8 bits at every step. Anything that the kernel does not know of changes more."""


class WholeBlocks:
    """The blocks of a packed span, for rows of few tokens, as decoding has. Not differentiable."""

    def __init__(
        self, layers: nn.ModuleList, rotary: nn.Module, store: KVStore, blocks: BlockRange, most_keys: float
    ) -> None:
        """Ask for one by `whole_blocks`, which knows whether the kernel fits."""
        self._owners = list(layers)  # of the memory that the kernel reads
        self._rotary = rotary
        self._blocks = (kernels.Block * len(layers))()
        for target, layer, number in zip(self._blocks, layers, blocks, strict=True):
            _describe(target, layer)
            keys_1NSH, values_1NSH = store.heads(number)
            target.keys, target.values = keys_1NSH.data_ptr(), values_1NSH.data_ptr()
        _, num_kv_heads, _, head_dim = keys_1NSH.shape
        attention: Any = layers[0].get_submodule("self_attn")
        self._sizes: dict[str, Any] = {
            "num_blocks": len(layers),
            "N": num_kv_heads,
            "G": self._blocks[0].q.N // self._blocks[0].k.N,
            "H": head_dim,
            "head": keys_1NSH.stride(1),
            "slot": keys_1NSH.stride(2),
            "scaling": attention.scaling,
        }
        self._store = store
        self._most_keys = most_keys

    def takes(self, pieces: Sequence[Piece]) -> bool:
        """Whether these pieces are few tokens, each of which sees all before it."""
        if sum(piece.length for piece in pieces) > MOST_TOKENS:
            return False
        scores = sum(piece.length * piece.num_keys for piece in pieces if piece.length > 1)
        return scores <= MOST_SCORES and all(
            piece.key_mask_T is None and piece.num_keys <= self._most_keys for piece in pieces
        )

    def __call__(self, x_TD: Tensor, position_ids_1T: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Run the blocks and write the keys and values; see PackedSpan."""
        x_TD = x_TD.clone(memory_format=torch.contiguous_format)
        cos_1TH, sin_1TH = (each.contiguous() for each in self._rotary(x_TD.unsqueeze(0), position_ids_1T))
        # To the kernel each token is the last one of a sequence: all are in their slots before any is looked at.
        runs = kernels.Runs([runs for piece in pieces for runs in _runs_of_each(piece)])
        slots = torch.tensor([slot for piece in pieces for slot in piece.slots_from(piece.position)])
        num_tokens, hidden_size = x_TD.shape
        wanted = (1, num_tokens, self._sizes["H"])
        assert cos_1TH.shape == sin_1TH.shape == wanted and runs.num_slots <= self._store.num_slots
        assert x_TD.dtype == cos_1TH.dtype == sin_1TH.dtype == torch.bfloat16
        kernels.decode(
            kernels.Pass(
                blocks=kernels.address_of(self._blocks),
                x=x_TD.data_ptr(),
                cos=cos_1TH.data_ptr(),
                sin=sin_1TH.data_ptr(),
                slots=slots.data_ptr(),
                runs=kernels.address_of(runs.slots),
                ends=kernels.address_of(runs.ends),
                T=num_tokens,
                D=hidden_size,
                level=kernels.best_level(),
                **self._sizes,
            )
        )
        return x_TD


def _runs_of_each(piece: Piece) -> Iterator[list[tuple[int, int]]]:
    """The slots that each new token sees."""
    for num_keys in range(piece.position + 1, piece.num_keys + 1):
        runs, missing = [], num_keys
        for start, end in piece.runs:
            if missing > 0:
                runs.append((start, min(end, start + missing)))
                missing -= end - start
        yield runs


def whole_blocks(span: Span, model: nn.Module, layers: nn.ModuleList, store: KVStore) -> WholeBlocks | None:
    """Return what decodes through a span, if the kernel computes what its blocks do.

    Args:
        model, layers: a twin of the span's model.
    """
    layout, rotary = store.layout, getattr(model, "rotary_emb", None)
    is_half = layout.device.type == "cpu" and layout.dtype == torch.bfloat16
    if not is_half or span.anatomy.model_type not in families.WHOLE or not kernels.is_compiled():
        return None
    if rotary is None or not all(_fits(layer) for layer in layers):
        return None
    if len({_sizes_of(layer) for layer in layers}) > 1 or len(set(layout.shapes)) > 1:
        return None
    if not _is_same(span, layers[0], rotary, store):
        logger.warning("this %s has blocks of another kind: decoding takes longer", span.anatomy.model_type)
        return None
    return WholeBlocks(layers, rotary, store, span.blocks, _most_keys(span.config))


def _most_keys(config: Any) -> float:
    """Up to how many keys each token sees all before it, in every block."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return 0
    # Not every type goes by the kinds of its layers: a window counts for all of them.
    window = getattr(config, "sliding_window", None)
    return math.inf if window is None else int(window)


def _fits(layer: nn.Module) -> bool:
    """Whether this is built of what the kernel knows, in sizes and types that it takes."""
    modules = dict(layer.named_modules())
    norms = [path for path in (*_NORMS.values(), *_HEAD_NORMS.values()) if path in modules]
    known = {"", "self_attn", "mlp", "mlp.act_fn", *_LINEAR.values(), *_NORMS.values(), *_HEAD_NORMS.values()}
    if modules.keys() - known or len(norms) % 2 or not known - set(_HEAD_NORMS.values()) <= modules.keys():
        return False
    linear: list[Any] = [modules[path] for path in _LINEAR.values()]
    return (
        type(modules["mlp.act_fn"]) in _SILU
        and all(isinstance(modules[path], HalfNorm) for path in norms)
        and all(isinstance(each, HalfLinear | CpuLinear) for each in linear)
        and all(each.bias is None or each.bias.dtype == torch.bfloat16 for each in linear)
        and all(tensor.is_contiguous() for each in linear for tensor in each.kernel_weights if tensor is not None)
        and modules["self_attn"].head_dim % HEAD_COLUMNS == 0
        and all(len({modules[_LINEAR[name]].bits for name in names}) == 1 for names in _SAME_ROWS)
    )


def _sizes_of(layer: nn.Module) -> tuple[tuple[int, int, int], ...]:
    linear: list[Any] = [layer.get_submodule(path) for path in _LINEAR.values()]
    return tuple((each.bits, each.out_features, each.in_features) for each in linear)


def _is_same(span: Span, layer: nn.Module, rotary: nn.Module, store: KVStore) -> bool:
    """Run two tokens of one sequence through the first block both ways."""
    shape = store.layout.shapes[span.blocks.start - store.layout.blocks.start]
    one = BlockRange(0, 1)
    tiny = KVStore(KVLayout(one, (shape,), torch.bfloat16, store.layout.device), 2)
    blocks = WholeBlocks(nn.ModuleList([layer]), rotary, tiny, one, math.inf)
    x_TD = torch.randn(2, span.hidden_size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids_T = torch.tensor([3, 5])
    mask_11TT = torch.full((2, 2), -torch.inf, dtype=torch.bfloat16).triu(1)[None, None]
    with torch.inference_mode():
        found = blocks(x_TD, ids_T[None], [Piece(2, 0, [(0, 2)])])
        whole = twin_of(span.layers[0], lambda config: config)
        places = rotary(x_TD[None], ids_T[None])
        wanted = whole(x_TD[None], position_embeddings=places, attention_mask=mask_11TT)
    added_TD = (wanted[0] if isinstance(wanted, tuple) else wanted).view_as(x_TD).float() - x_TD.float()
    error = found.float() - x_TD.float() - added_TD
    return bool((error.norm(dim=1) <= _ALLOWED_ERROR * added_TD.norm(dim=1)).all())


def _describe(target: kernels.Block, layer: nn.Module) -> None:
    for name, path in _LINEAR.items():
        linear: Any = layer.get_submodule(path)
        weights, scales = linear.kernel_weights
        bias = linear.bias
        setattr(
            target,
            name,
            kernels.Linear(
                w=weights.data_ptr(),
                scales=None if scales is None else scales.data_ptr(),
                bias=None if bias is None else bias.data_ptr(),
                N=linear.out_features,
                K=linear.in_features,
                bits=linear.bits,
            ),
        )
    modules = dict(layer.named_modules())
    for name, path in (_NORMS | _HEAD_NORMS).items():
        if path in modules:
            norm: Any = modules[path]
            setattr(target, name, kernels.Norm(weight=norm.weight.data_ptr(), epsilon=norm.epsilon))
