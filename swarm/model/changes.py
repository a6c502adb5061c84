"""The kinds of changes that a client may make at a module of a block, for its own calls: declared here, never sent."""

# I inputs of a module, O its outputs, R rank, K bottleneck size, P tokens of a prefix

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional

from swarm.errors import BadRequest

Drop = Callable[[Tensor, float], Tensor]
"""Takes the input of a module and the share of its features to drop; returns it with those set to 0, others scaled."""

_TARGET = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,7}")

PAST = "past_key_values"
"""The target of a prefix, in place of a module: what a block's cache holds before the first token."""

MAX_PREFIX_TOKENS = 1024

Activation = Literal["relu", "gelu", "silu", "tanh"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Scalars(BaseModel):
    """What a kind of change has beside tensors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _LoraScalars(Scalars):
    scaling: Annotated[float, Field(allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0


class _Ia3Scalars(Scalars):
    of_input: bool = False


class _BottleneckScalars(Scalars):
    activation: Activation = "relu"


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """What is changed at one module of a block, for the calls that name the adapter.

    A subclass's fields are the target, its tensors, and its scalars. Several changes at one module apply in the order
    of their kinds' names.
    """

    kind: ClassVar[str]
    scalars: ClassVar[type[Scalars]] = Scalars

    target: str
    """Name of the module within its block: "self_attn.q_proj", "mlp", …"""

    def __post_init__(self) -> None:
        if not _TARGET.fullmatch(self.target):
            raise BadRequest(f"{self.target[:64]!r} is no name of a module: use one such as 'self_attn.q_proj'")
        try:
            self.scalars(**self.scalar_values())
        except ValidationError as exc:
            raise BadRequest(f"the {self.kind} change of {self.target}: {first_error(exc)}") from exc

    @property
    def name(self) -> str:
        return f"{self.target}/{self.kind}"

    def scalar_values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.scalars.model_fields}

    @classmethod
    def tensor_names(cls) -> list[str]:
        """The names of its tensors, in order."""
        return sorted(each.name for each in fields(cls) if each.name not in {"target", *cls.scalars.model_fields})

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, in the order of their names."""
        return {name: getattr(self, name) for name in self.tensor_names()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same change with other tensors."""
        others: dict[str, Any] = dict(tensors)
        return replace(self, **others)

    @property
    def changes_input(self) -> bool:
        """Whether the module is given something else than without it."""
        return False

    @abstractmethod
    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        """The shapes that its tensors must have at a module of this size."""

    def check(self, in_features: int, out_features: int) -> None:
        """Raise BadRequest unless it fits a module of this size."""
        wanted = self.shapes(in_features, out_features)
        for name, tensor in self.tensors().items():
            if list(tensor.shape) != wanted[name]:
                raise BadRequest(
                    f"the {self.kind} change of {self.target} needs {name!r} of the shape {wanted[name]}, "
                    f"not {list(tensor.shape)}"
                )

    def _check_size(self, name: str, size: int, most: int) -> None:
        """Refuse what would cost more than the module itself."""
        if size > most:
            raise BadRequest(f"the {self.kind} change of {self.target} has the {name} {size}: use at most {most}")

    def enter(self, x: Tensor) -> Tensor:
        """What the module is given instead of x, [..., I]."""
        return x

    def apply(self, x: Tensor, y: Tensor, drop: Drop | None = None) -> Tensor:
        """What the module returns instead of y.

        Args:
            x: what the module was given, [..., I].
            y: what it made of it, [..., O].
            drop: None: nothing is dropped, as when the model is not trained.
        Returns: the shape and dtype of y; differentiable in x, y and the change's own tensors.
        """
        return y


@dataclass(frozen=True, eq=False)
class Lora(Change):
    """A product of low rank beside the module (Hu et al. 2021, LoRA): y + scaling * B A x.

    A x is computed in the dtype of A, as PEFT does. rsLoRA is another scaling.
    """

    kind: ClassVar[str] = "lora"
    scalars: ClassVar[type[Scalars]] = _LoraScalars

    a_RI: Tensor
    b_OR: Tensor
    scaling: float = 1.0
    dropout: float = 0.0
    """Share of the features of x that are dropped in training."""

    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        rank = self.a_RI.shape[0]
        self._check_size("rank", rank, max(in_features, out_features))
        return {"a_RI": [rank, in_features], "b_OR": [out_features, rank]}

    def apply(self, x: Tensor, y: Tensor, drop: Drop | None = None) -> Tensor:
        x = x.to(self.a_RI.dtype)
        if drop is not None and self.dropout:
            x = drop(x, self.dropout)
        dtype = torch.promote_types(y.dtype, x.dtype)
        low, b_RO = functional.linear(x, self.a_RI).flatten(0, -2).to(dtype), self.b_OR.to(dtype).T
        # One operation instead of three, each of which would read and write all of y.
        sums = torch.addmm(y.flatten(0, -2).to(dtype), low, b_RO, alpha=self.scaling)
        return sums.view(y.shape).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Ia3(Change):
    """Learned factors of the module's outputs, or of its inputs (Liu et al. 2022, IA3)."""

    kind: ClassVar[str] = "ia3"
    scalars: ClassVar[type[Scalars]] = _Ia3Scalars

    factors: Tensor
    """[O], or [I] with `of_input`."""
    of_input: bool = False

    @property
    def changes_input(self) -> bool:
        return self.of_input

    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"factors": [in_features if self.of_input else out_features]}

    def enter(self, x: Tensor) -> Tensor:
        return (x.to(self.factors.dtype) * self.factors).to(x.dtype) if self.of_input else x

    def apply(self, x: Tensor, y: Tensor, drop: Drop | None = None) -> Tensor:
        return y if self.of_input else (y * self.factors).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Bias(Change):
    """Something added to the module's outputs, beside the bias that it may have."""

    kind: ClassVar[str] = "bias"

    bias_O: Tensor

    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {"bias_O": [out_features]}

    def apply(self, x: Tensor, y: Tensor, drop: Drop | None = None) -> Tensor:
        return (y + self.bias_O).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Bottleneck(Change):
    """A small network behind the module (Houlsby et al. 2019; Pfeiffer et al. 2021): y + up(activation(down(y)))."""

    kind: ClassVar[str] = "bottleneck"
    scalars: ClassVar[type[Scalars]] = _BottleneckScalars

    down_KO: Tensor
    down_bias_K: Tensor
    up_OK: Tensor
    up_bias_O: Tensor
    activation: Activation = "relu"

    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        size = self.down_KO.shape[0]
        self._check_size("size", size, max(in_features, out_features))
        return {
            "down_KO": [size, out_features],
            "down_bias_K": [size],
            "up_OK": [out_features, size],
            "up_bias_O": [out_features],
        }

    def apply(self, x: Tensor, y: Tensor, drop: Drop | None = None) -> Tensor:
        dtype = self.down_KO.dtype
        low = functional.linear(y.to(dtype), self.down_KO, self.down_bias_K.to(dtype))
        added = functional.linear(_ACTIVATIONS[self.activation](low), self.up_OK.to(dtype), self.up_bias_O.to(dtype))
        return (y + added).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Prefix(Change):
    """Keys and values that every token sees in front of its sequence (Li and Liang 2021, Prefix-Tuning).

    No module is changed: a sequence begins behind P tokens whose keys and values are these, as they are, in all heads.
    """

    kind: ClassVar[str] = "prefix"

    keys_PI: Tensor
    """I and O: what one token leaves in the cache, all heads of keys or values one after the other."""
    values_PO: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target != PAST:
            raise BadRequest(f"a prefix stands in front of a whole block: its target is {PAST!r}, not {self.target!r}")

    @property
    def num_tokens(self) -> int:
        return self.keys_PI.shape[0]

    def shapes(self, in_features: int, out_features: int) -> dict[str, list[int]]:
        self._check_size("length", self.num_tokens, MAX_PREFIX_TOKENS)
        return {"keys_PI": [self.num_tokens, in_features], "values_PO": [self.num_tokens, out_features]}


KINDS: dict[str, type[Change]] = {each.kind: each for each in (Bias, Bottleneck, Ia3, Lora, Prefix)}


def first_error(exc: ValidationError) -> str:
    """The first thing that pydantic found wrong, in one line."""
    error = exc.errors()[0]
    place = ".".join(str(part)[:64] for part in error["loc"])
    return f"{place}: {error['msg'][:200]}" if place else error["msg"][:200]
