"""The memory of keys and values: its size is known before it is taken, and it is taken as slots are written."""

from __future__ import annotations

import psutil
import pytest
import torch
from packing import make_span
from tiny_configs import tiny_config

from swarm.errors import UnsupportedModel
from swarm.model.kv_store import KVShape, KVStore, kv_layout, read_runs
from swarm.ranges import BlockRange


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("llama", KVShape(2, 16, 16)),
        ("gpt2", KVShape(4, 16, 16)),
        ("deepseek_v3", KVShape(1, 16, 8)),
    ],
)
def test_shapes_are_those_of_the_model(model_type: str, shape: KVShape) -> None:
    layout = kv_layout(make_span(tiny_config(model_type), BlockRange(1, 3)))
    assert layout.blocks == BlockRange(1, 3) and layout.shapes == (shape, shape) and layout.dtype == torch.float32
    assert layout.bytes_per_slot == 2 * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * 4
    store = KVStore(layout, 7)
    assert store.num_bytes == 7 * layout.bytes_per_slot
    assert [tuple(tensor.shape) for tensor in store.block(2)] == [
        (7, shape.num_kv_heads, shape.key_dim),
        (7, shape.num_kv_heads, shape.value_dim),
    ]


def test_blocks_may_differ() -> None:
    layout = kv_layout(make_span(tiny_config("gemma4_text")))
    assert len({shape.key_dim for shape in layout.shapes}) == 2


def test_states_beyond_keys_and_values_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="block 0"):
        kv_layout(make_span(tiny_config("qwen3_next")))


def test_a_slot_takes_what_a_cache_takes_for_a_token() -> None:
    span = make_span(tiny_config("llama"))
    assert kv_layout(span).bytes_per_slot == span.cache_bytes_per_token()


def test_memory_is_taken_only_as_slots_are_written() -> None:
    layout = kv_layout(make_span(tiny_config("llama")))
    before = psutil.Process().memory_info().rss
    store = KVStore(layout, (8 << 30) // layout.bytes_per_slot)
    assert store.num_bytes > 7 << 30
    for number in layout.blocks:
        for heads in store.block(number):
            heads[:100] = 1
    assert psutil.Process().memory_info().rss - before < 256 << 20


def test_written_and_copied_slots_read_back() -> None:
    store = KVStore(kv_layout(make_span(tiny_config("deepseek_v3"))), 12)
    for number in store.layout.blocks:
        for heads in store.block(number):
            heads.zero_()
    keys, values = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 8)
    store.write(2, torch.tensor([9, 4, 5]), keys, values)
    runs = [(9, 10), (4, 6)]
    assert torch.equal(read_runs(store.heads(2)[0], runs), keys)
    assert torch.equal(read_runs(store.heads(2)[1], runs), values)
    assert not store.block(1)[0].any() and torch.equal(store.block(2)[0][9], keys[0, :, 0])
    store.copy([(4, 0, 2), (9, 11, 1)])
    assert torch.equal(read_runs(store.heads(2)[1], [(11, 12), (0, 2)]), values)


def test_one_run_is_read_without_a_copy() -> None:
    store = KVStore(kv_layout(make_span(tiny_config("llama"))), 12)
    keys = read_runs(store.heads(0)[0], [(3, 6)])
    assert keys.untyped_storage().data_ptr() == store.heads(0)[0].untyped_storage().data_ptr()
