"""The way through the blocks of a base model: hidden states are put in at its first block and taken out after its last.

What the model's `forward` does before and after them (embedding norms, learned positions, scaling, final norm) takes
no part. What a call changes in the blocks (edits.py) is changed by hooks that are there during that call alone.
"""

# B batch, L length, D hidden

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swarm.model.edits import AddPrompt, Edits, ModuleEdit


@dataclass(slots=True, eq=False)
class _Call:
    """What the hooks of one call need: the hidden states to put in, and those that come out."""

    x_BLD: Tensor
    edits: Edits | None
    out_BLD: Tensor | None = None


class Passage:
    """Hooks on the blocks of a model. Calls may come from several threads, and one within another."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self._model = model
        self._layers = layers
        self._local = threading.local()
        layers[0].register_forward_pre_hook(self._put_in, with_kwargs=True)
        layers[-1].register_forward_hook(self._take_out)

    def __call__(self, x_BLD: Tensor, inputs: dict[str, Any], edits: Edits | None = None) -> Tensor:
        """Run the model's `forward` with these inputs; return what leaves its last block."""
        call = _Call(x_BLD, edits)
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            if edits is None:
                self._model(inputs_embeds=x_BLD, **inputs)
            else:
                with self._hooks(call, edits):
                    self._model(inputs_embeds=x_BLD, **inputs)
        finally:
            self._local.call = outer
        assert call.out_BLD is not None, "the base model never ran its last block"
        return call.out_BLD

    def _put_in(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call: _Call = self._local.call
        add_prompt = None if call.edits is None else call.edits.add_prompt
        x_BLD = call.x_BLD if add_prompt is None else add_prompt(call.x_BLD, 0)
        return _replace_first(args, kwargs, x_BLD)

    def _take_out(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._local.call.out_BLD = output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _hooks(self, call: _Call, edits: Edits) -> Iterator[None]:
        """Hooks for what one call changes, set only while needed: each costs time in every call of its module."""
        with ExitStack() as hooks:
            if edits.add_prompt is not None:
                for index, layer in enumerate(self._layers):
                    if index:
                        before = self._prompt_hook(call, edits.add_prompt, index)
                        hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            for (index, target), edit in edits.modules.items():
                module = self._layers[index].get_submodule(target)
                if edit.changes_input:
                    before = self._input_hook(call, edit)
                    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                after = self._output_hook(call, edit)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _prompt_hook(self, call: _Call, add_prompt: AddPrompt, index: int) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._local.call is not call:  # that of a call within this one
                return None
            return _replace_first(args, kwargs, add_prompt(first_input(args, kwargs), index))

        return add

    def _input_hook(self, call: _Call, edit: ModuleEdit) -> Any:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._local.call is not call:
                return None
            return _replace_first(args, kwargs, edit.enter(first_input(args, kwargs)))

        return enter

    def _output_hook(self, call: _Call, edit: ModuleEdit) -> Any:
        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._local.call is not call:
                return None
            x = first_input(args, kwargs)
            return (edit.leave(x, output[0]), *output[1:]) if isinstance(output, tuple) else edit.leave(x, output)

        return leave


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module of the library works on: its first argument, or the one that is called so."""
    return args[0] if args else kwargs["hidden_states"]


def _replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], x_BLD: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x_BLD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x_BLD})
