"""The way through the blocks of a base model: hidden states are put in at its first block and taken out after its last.

What the model's `forward` does before and after them (embedding norms, learned positions, scaling, final norm) takes
no part.
"""

# B batch, L length, D hidden

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

AddPrompt = Callable[[Tensor, int], Tensor]
"""Takes the hidden states that enter a block, and the block's place in the list; returns them with its deep prompt."""


@dataclass(slots=True, eq=False)
class _Call:
    """What the hooks of one call need: the hidden states to put in, and those that come out."""

    x_BLD: Tensor
    add_prompt: AddPrompt | None
    out_BLD: Tensor | None = None


class Passage:
    """Hooks on the blocks of a model. Calls may come from several threads, and one within another."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self._model = model
        self._layers = layers
        self._local = threading.local()
        layers[0].register_forward_pre_hook(self._put_in, with_kwargs=True)
        layers[-1].register_forward_hook(self._take_out)

    def __call__(self, x_BLD: Tensor, inputs: dict[str, Any], add_prompt: AddPrompt | None = None) -> Tensor:
        """Run the model's `forward` with these inputs; return what leaves its last block."""
        call = _Call(x_BLD, add_prompt)
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            if add_prompt is None:
                self._model(inputs_embeds=x_BLD, **inputs)
            else:
                with self._prompt_hooks(call):
                    self._model(inputs_embeds=x_BLD, **inputs)
        finally:
            self._local.call = outer
        assert call.out_BLD is not None, "the base model never ran its last block"
        return call.out_BLD

    def _put_in(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call: _Call = self._local.call
        x_BLD = call.x_BLD if call.add_prompt is None else call.add_prompt(call.x_BLD, 0)
        return _replace_hidden_states(args, kwargs, x_BLD)

    def _take_out(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._local.call.out_BLD = output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _prompt_hooks(self, call: _Call) -> Iterator[None]:
        """Hooks for the deep prompts of one call, set only while needed: each costs time in every call of its block."""

        def hook_for(index: int) -> Any:
            def add_prompt(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if self._local.call is not call or call.add_prompt is None:  # that of a call within this one
                    return None
                x_BLD = args[0] if args else kwargs["hidden_states"]
                return _replace_hidden_states(args, kwargs, call.add_prompt(x_BLD, index))

            return add_prompt

        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                if index:
                    handle = layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
                    hooks.callback(handle.remove)
            yield


def _replace_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], x_BLD: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x_BLD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x_BLD})
