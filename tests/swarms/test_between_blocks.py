"""Modules of one's own between remote blocks: autograd through all of it, and hidden states read and edited there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swarms_help import wait_idle
from tiny import HIDDEN, load_local, random_ids
from torch import Tensor, nn

from swarm.errors import BadRequest

TOLERANCE = 1e-4


class Between(nn.Module):
    """Two slices of remote blocks with a small network between them."""

    def __init__(self, blocks: Any, at: int) -> None:
        super().__init__()
        self.before, self.after = blocks[:at], blocks[at:]
        self.own = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, HIDDEN))

    def forward(self, x_BLD: Tensor, **how: Any) -> Tensor:
        x_BLD = self.before(x_BLD, **how)
        return self.after(x_BLD + self.own(x_BLD), **how)


def insert(local: Any, at: int, own: nn.Module) -> None:
    """The same in a whole model: what enters a block is changed first."""
    layer = local.get_decoder().layers[at] if hasattr(local, "get_decoder") else local.model.layers[at]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + own(args[0]), *args[1:]), kwargs), with_kwargs=True
    )


def padded_batch() -> dict[str, Tensor]:
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def curve(model: Any, own: nn.Module) -> tuple[list[float], list[Tensor]]:
    """The losses of some steps that train the model's embeddings and the module, and the gradients of the first."""
    trained = [*own.parameters(), model.get_input_embeddings().weight]
    optimizer, losses, gradients = torch.optim.Adam(trained, lr=5e-3), [], []
    for _ in range(8):
        loss = model(**padded_batch(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or [each.grad.clone() for each in trained]
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("model_type, at", [("llama", 3), ("gemma2", 1)])
def test_a_module_between_slices_trains_as_in_a_whole_model(swarms: Any, model_type: str, at: int) -> None:
    ranges = ((0, 2), (2, 4), (4, 6)) if model_type == "llama" else ((0, 1), (1, 3), (3, 4))
    swarm, path = swarms.get(model_type, ranges)
    remote, local = swarms.join(swarm, path), load_local(path)
    ours = Between(remote.remote_blocks, at)
    assert {name.split(".")[0] for name, _ in ours.named_parameters()} == {"own"}
    own = copy.deepcopy(ours.own)
    insert(local, at, own)
    with remote.run_through(ours):
        losses, gradients = curve(remote, ours.own)
    wanted_losses, wanted_gradients = curve(local, own)
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert losses == pytest.approx(wanted_losses, abs=1e-3) and losses[-1] < losses[0] - 0.1
    ids = random_ids(1, 5)
    with torch.no_grad(), remote.run_through(ours):
        text = remote.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(text, local.generate(ids, max_new_tokens=6, do_sample=False))


def test_hidden_states_at_any_depth_are_read_and_edited(llama: Any) -> None:
    ids, seen = random_ids(2, 7), {}

    class Reader(nn.Module):
        def __init__(self, edit: Callable[[int, Tensor], Tensor]) -> None:
            super().__init__()
            self.edit = edit

        def forward(self, x_BLD: Tensor, **how: Any) -> Tensor:
            for number in range(len(llama.remote.remote_blocks)):
                x_BLD = self.edit(number, llama.remote.remote_blocks[number](x_BLD, **how))
            return x_BLD

    def read(number: int, x_BLD: Tensor) -> Tensor:
        seen[number] = x_BLD
        return x_BLD

    with torch.no_grad():
        with llama.remote.run_through(Reader(read)):
            whole = llama.remote(ids, use_cache=False).logits
        wanted = llama.local(ids, output_hidden_states=True).hidden_states
        for number in range(5):
            torch.testing.assert_close(seen[number], wanted[number + 1], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(whole, llama.local(ids).logits, atol=TOLERANCE, rtol=0)

        def swap(number: int, x_BLD: Tensor) -> Tensor:
            return x_BLD.flip(0) if number == 2 else x_BLD

        with llama.remote.run_through(Reader(swap)):
            swapped = llama.remote(ids, use_cache=False).logits
    torch.testing.assert_close(swapped, whole.flip(0), atol=TOLERANCE, rtol=0)


def test_sessions_are_refused_while_something_is_between_the_blocks(llama: Any) -> None:
    ids, between = random_ids(1, 4), Between(llama.remote.remote_blocks, 3)
    with llama.remote.inference_session(max_length=16) as session, torch.no_grad():
        llama.remote.generate(ids, max_new_tokens=1)
        with llama.remote.run_through(between):
            with pytest.raises(BadRequest, match="use_cache=False inside run_through"):
                llama.remote.generate(max_new_tokens=1, session=session)
            with pytest.raises(BadRequest, match="use_cache=False inside run_through"):
                llama.remote(ids, use_cache=True)
            cache = llama.remote(ids).past_key_values
    with torch.no_grad(), pytest.raises(BadRequest, match="use_cache=False there"):
        llama.remote(ids, past_key_values=cache)
    wait_idle(llama.swarm)
