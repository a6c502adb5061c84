"""What a client sees of the blocks: modules with the names, types and shapes of the real ones, but no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from swarm.errors import BadRequest

_aten = torch.ops.aten

_MAKES_ANOTHER = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.empty_like.default,
}
"""Operations that look at no number: what PEFT and `.to()` do to find out where a weight lies, and to follow it."""


class RemoteTensor(Tensor):
    """A weight that lies on servers: here it has a shape, a dtype and the client's device, and no memory.

    PEFT reads these three to make an adapter that fits, on the right device. Everything that asks for its numbers,
    as merging does, or an initialization from the weights, is refused.
    """

    @staticmethod
    def __new__(
        cls, like: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RemoteTensor:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=device or like.device, requires_grad=False
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a placeholder
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MAKES_ANOTHER:
            kwargs = kwargs or {}
            return RemoteTensor(args[0], kwargs.get("device"), kwargs.get("dtype"))
        raise BadRequest(
            f"{func.__name__.partition('.')[0]} needs the weights of remote blocks, and those lie on servers: what "
            "merges an adapter into them, starts it from them (PiSSA, OLoRA, CorDA, LoftQ, ...) or scales it by them "
            "(DoRA) works on a local copy of the model only"
        )

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise BadRequest(
                "the weights and biases of remote blocks never change, so they cannot be trained: leave bias='none', "
                "or use BeftConfig, which trains biases of its own beside them"
            )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RemoteTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class RemoteLayers(nn.ModuleList):
    """The layer list of the client: shadows of all blocks to look at, one module to run.

    The shadows hold remote tensors, which are not parameters. Otherwise `parameters()` would hand them to optimizers,
    and `state_dict()` would save them.
    """

    def __init__(self, layers: nn.ModuleList, remote: nn.Module) -> None:
        super().__init__(layers)
        self.__dict__["remote"] = remote
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name in list(tensors):
                    tensor = tensors.pop(name)
                    module.__dict__[name] = None if tensor is None else tensor.detach().to("meta")
            module._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to initialize

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the weights remote ones. Until then they are on `meta`: some models write them when initialized."""
        for module in self.modules():
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor) and value.is_meta:
                    module.__dict__[name] = RemoteTensor(value, device, dtype if value.is_floating_point() else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RemoteLayers:
        """Follow the client to another device or dtype, so that the next adapter is made there."""
        super()._apply(fn, recurse)
        for module in self.modules():
            for name, value in module.__dict__.items():
                if isinstance(value, RemoteTensor):
                    module.__dict__[name] = fn(value)
        return self

    def __iter__(self) -> Iterator[nn.Module]:
        yield self.__dict__["remote"]

    def __getitem__(self, index: Any) -> Any:
        return [self.__dict__["remote"]] if isinstance(index, slice) else super().__getitem__(index)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)
