"""What is packed is unpacked unchanged; what does not add up is refused before anything is allocated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarm.codec import CHUNK_BYTES, Unpacker, dtype_name, optional, pack, torch_dtype, wire_dtype
from swarm.errors import BadRequest, ProtocolError
from swarm.v1 import blocks_pb2 as pb

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
FLOATS = DTYPES[:3]
PLENTY = 1 << 30

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 1000)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int64:
        return torch.randint(-(2**62), 2**62, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


def unpack(packed: object, max_bytes: int = PLENTY) -> list[Tensor | None]:
    unpacker = Unpacker(packed.specs, max_bytes=max_bytes)
    if packed.data:
        unpacker.feed(packed.data)
    for part in packed.more:
        unpacker.feed(part)
    assert unpacker.done
    return unpacker.tensors()


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5), seeds)
@settings(max_examples=60, deadline=None)
def test_raw_tensors_of_every_dtype_and_shape_come_back_equal(kinds, seed):
    tensors = [make(shape, dtype, seed + number) for number, (shape, dtype) in enumerate(kinds)]
    for sent, received in zip(tensors, unpack(pack(*tensors)), strict=True):
        assert received.dtype == sent.dtype and received.shape == sent.shape
        assert torch.equal(received, sent)


@given(shapes, st.sampled_from(FLOATS), seeds, st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_eight_bit_rows_come_back_within_half_a_step(shape, dtype, seed, scale):
    sent = (make(shape, torch.float32, seed) * scale).to(dtype)
    (received,) = unpack(pack(sent, codec=pb.CODEC_INT8_PER_ROW))
    assert received.dtype == dtype and received.shape == sent.shape
    rows = sent.float().reshape(-1, shape[-1])
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    rounding = rows.abs().amax() * torch.finfo(dtype).eps
    assert bool(((received.float().reshape(rows.shape) - rows).abs() <= 0.501 * step + rounding).all())


def test_eight_bit_codec_carries_rows_of_zeros_and_leaves_integers_raw():
    zeros, numbers = torch.zeros(3, 4), torch.arange(6).reshape(2, 3)
    packed = pack(zeros, numbers, codec=pb.CODEC_INT8_PER_ROW)
    assert packed.specs[1].codec == pb.CODEC_RAW
    received = unpack(packed)
    assert torch.equal(received[0], zeros) and torch.equal(received[1], numbers)


def test_absent_tensors_stay_absent_and_in_their_place():
    x = torch.randn(2, 3)
    received = unpack(pack(None, x, None))
    assert received[0] is None and received[2] is None and torch.equal(received[1], x)


def test_views_that_are_not_contiguous_travel_in_row_major_order():
    x = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)
    assert torch.equal(unpack(pack(x))[0], x)


def test_received_tensors_are_writable_and_of_their_own():
    x, y = unpack(pack(torch.ones(3, dtype=torch.float16), torch.ones(2, dtype=torch.int64)))
    x += 1
    assert torch.equal(y, torch.ones(2, dtype=torch.int64))
    y += 1
    assert torch.equal(x, torch.full((3,), 2.0, dtype=torch.float16))


def test_large_tensors_are_cut_into_chunks():
    x = torch.randn(CHUNK_BYTES // 4 + 5, 2)
    packed = pack(x)
    assert len(packed.more) == math.ceil(x.nbytes / CHUNK_BYTES) - 1
    assert all(len(part) <= CHUNK_BYTES for part in [packed.data, *packed.more])
    assert torch.equal(unpack(packed)[0], x)


def spec(**changes: object) -> pb.TensorSpec:
    fields = {"dtype": pb.DTYPE_FLOAT32, "codec": pb.CODEC_RAW, "shape": [2, 3], "num_bytes": 24}
    return pb.TensorSpec(**(fields | changes))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_bytes": 23}, "takes 24 bytes, the message claims 23"),
        ({"num_bytes": 2**63}, "takes 24 bytes"),
        ({"shape": [2, 0], "num_bytes": 0}, "dimensions of at least 1"),
        ({"shape": [], "num_bytes": 4}, "1 to 4 dimensions"),
        ({"shape": [1, 1, 1, 2, 3]}, "1 to 4 dimensions"),
        ({"shape": [1] * 100_000}, "1 to 4 dimensions"),
        ({"dtype": pb.DTYPE_UNSPECIFIED}, "unknown tensor dtype"),
        ({"dtype": 77}, "unknown tensor dtype 77"),
        ({"codec": pb.CODEC_UNSPECIFIED}, "unknown tensor codec"),
        ({"codec": 9}, "unknown tensor codec 9"),
        ({"dtype": pb.DTYPE_INT64, "codec": pb.CODEC_INT8_PER_ROW, "num_bytes": 14}, "floating-point tensors only"),
        ({"codec": pb.CODEC_INT8_PER_ROW}, "takes 14 bytes"),
    ],
)
def test_a_spec_that_is_not_allowed_is_refused(changes, sentence):
    with pytest.raises(ProtocolError, match=sentence) as caught:
        Unpacker([spec(**changes)], max_bytes=PLENTY)
    assert len(str(caught.value)) < 300


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=6),
    st.integers(0, 6),
    st.integers(0, 4),
    st.integers(0, 2**64 - 1) | st.just(2**40),
)
@settings(max_examples=200, deadline=None)
def test_no_spec_makes_an_unpacker_take_more_than_its_limit(shape, dtype, codec, num_bytes):
    claimed = pb.TensorSpec(dtype=dtype, codec=codec, shape=shape, num_bytes=num_bytes)
    try:
        unpacker = Unpacker([claimed], max_bytes=1000)
    except ProtocolError:
        return
    assert num_bytes <= 1000 and math.prod(shape) <= 1000
    assert not unpacker.done


def test_the_size_is_checked_before_anything_is_allocated():
    huge = spec(shape=[2**19, 2**19], num_bytes=2**40)
    with pytest.raises(ProtocolError, match=f"claims {2**40} bytes"):
        Unpacker([huge], max_bytes=1 << 20)


def test_the_limit_counts_all_tensors_of_a_message_and_what_they_decode_to():
    Unpacker([spec(), spec()], max_bytes=48)
    with pytest.raises(ProtocolError, match="claims 48 bytes"):
        Unpacker([spec(), None, spec()], max_bytes=47)
    with pytest.raises(ProtocolError, match="claims 24 bytes"):
        Unpacker([spec(codec=pb.CODEC_INT8_PER_ROW, num_bytes=14)], max_bytes=20)


def test_too_many_bytes_are_refused_when_they_come():
    unpacker = Unpacker([spec()], max_bytes=PLENTY)
    unpacker.feed(bytes(20))
    with pytest.raises(ProtocolError, match="24 bytes were announced, 25 came"):
        unpacker.feed(bytes(5))


def test_too_few_bytes_give_no_tensors():
    unpacker = Unpacker([spec()], max_bytes=PLENTY)
    unpacker.feed(bytes(23))
    assert not unpacker.done
    with pytest.raises(ProtocolError, match="only 23 came"):
        unpacker.tensors()


def test_an_empty_part_is_refused_while_bytes_are_missing():
    with pytest.raises(ProtocolError, match="carries no bytes"):
        Unpacker([spec()], max_bytes=PLENTY).feed(b"")


def test_bytes_without_tensors_are_refused():
    with pytest.raises(ProtocolError, match="0 bytes were announced"):
        Unpacker([None], max_bytes=PLENTY).feed(b"x")


def test_optional_gives_none_for_absent_fields():
    step = pb.Step(hidden_states=spec())
    assert optional(step, "hidden_states", "attention_mask") == [spec(), None]


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_names_are_read_back(dtype):
    assert torch_dtype(dtype_name(dtype)) is dtype


def test_dtypes_that_do_not_travel_are_refused_by_name():
    for name in ("int64", "float64", "", "bf16"):
        with pytest.raises(BadRequest, match="use float32, float16 or bfloat16"):
            torch_dtype(name)
    assert wire_dtype(torch.bfloat16) == pb.DTYPE_BFLOAT16
