"""Where a classifier looks: at the last token of each sequence, which it has to be able to tell from padding."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from swarm.errors import BadRequest


def refuse_padding_at_the_end_of_embeddings(model: nn.Module) -> None:
    """Let a classifier refuse embeddings with padding behind a sequence.

    The library's classes find padding by its token id. Handed embeddings, as by PEFT's prompt tuning, they look at the
    last position of each row, whatever stands there, and say so in a warning at most.
    """
    parameters = list(inspect.signature(model.forward).parameters)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, **dict(zip(parameters, args, strict=False))}
        mask = given.get("attention_mask")
        if given.get("inputs_embeds") is None or not isinstance(mask, Tensor) or bool(mask[:, -1].all()):
            return
        raise BadRequest(
            "a classifier that is handed embeddings, as by prompt tuning, looks at the last position of each row, and "
            "some end with padding: pad on the left (tokenizer.padding_side = 'left'), or train with LoRA or a prefix"
        )

    model.register_forward_pre_hook(check, with_kwargs=True)
