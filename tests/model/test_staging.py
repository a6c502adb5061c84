"""What goes to a device in one copy arrives as it was, each tensor where a kernel may read it."""

from __future__ import annotations

import torch

from swarm.model.staging import ALIGNMENT, Block, Fetch, Field, send

CPU = torch.device("cpu")
TENSORS = [
    torch.randn(3, 5).to(torch.bfloat16),
    torch.arange(7),
    torch.zeros(0, dtype=torch.int64),
    torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
]


def fields() -> list[Field]:
    return [Field(tuple(tensor.shape), tensor.dtype) for tensor in TENSORS]


def test_a_block_holds_tensors_side_by_side_in_one_piece_of_memory() -> None:
    host, device = Block(fields(), CPU), Block(fields(), CPU)
    host.fill(TENSORS)
    device.memory.copy_(host.memory)
    for own, tensor in zip(device.tensors, TENSORS, strict=True):
        assert torch.equal(own, tensor) and own.dtype == tensor.dtype and own.is_contiguous()
        offset = own.data_ptr() - device.memory.data_ptr()
        assert own.numel() == 0 or (offset % ALIGNMENT == 0 and 0 <= offset < device.memory.nbytes)


def test_a_block_can_be_loaded_again_and_casts() -> None:
    block = Block(fields(), CPU)
    views = block.tensors
    for factor in (1, 2):
        block.load([TENSORS[0].float() * factor, *TENSORS[1:]])
        assert torch.equal(views[0], TENSORS[0] * factor) and torch.equal(views[3], TENSORS[3])


def test_on_a_cpu_nothing_is_copied() -> None:
    assert all(found is tensor for found, tensor in zip(send(TENSORS, CPU), TENSORS, strict=True))
    assert Fetch(TENSORS[0]).collect() is TENSORS[0]


def test_what_is_on_the_device_stays_there_and_the_rest_follows_in_order() -> None:
    meta = torch.device("meta")
    there = torch.empty(2, 2, device=meta)
    first, second, third = send([TENSORS[0], there, TENSORS[3]], meta)
    assert second is there and first.device == third.device == meta
    assert (first.shape, first.dtype) == (TENSORS[0].shape, TENSORS[0].dtype)
    assert (third.shape, third.dtype) == (TENSORS[3].shape, TENSORS[3].dtype)
    assert first.untyped_storage()._cdata == third.untyped_storage()._cdata  # one piece of memory: one copy
