"""What a server refuses before its model sees anything."""

from __future__ import annotations

import pytest
import torch

from swarm import PROTOCOL_VERSION
from swarm.errors import BadRequest, Draining, PromptTooLong, ProtocolError
from swarm.ranges import BlockRange
from swarm.server import checks
from swarm.server.checks import ServiceLimits
from swarm.streams import Step
from swarm.v1 import blocks_pb2 as pb

LIMITS = ServiceLimits(max_step_tokens=100, max_batch_size=8, max_virtual_tokens=4)


def spec(*shape: int, dtype: pb.DType.ValueType = pb.DTYPE_FLOAT32) -> pb.TensorSpec:
    return pb.TensorSpec(dtype=dtype, codec=pb.CODEC_RAW, shape=shape)


def test_another_protocol_version_is_told_what_to_install():
    checks.check_version(PROTOCOL_VERSION)
    for version in (0, PROTOCOL_VERSION + 1):
        with pytest.raises(ProtocolError, match="install the same release of swarm-llm on both"):
            checks.check_version(version)


def test_another_model_is_told_which_one_is_here():
    checks.check_fingerprint("abc", "abc", "tiny")
    with pytest.raises(BadRequest, match="holds tiny .fingerprint abc") as caught:
        checks.check_fingerprint("x" * 10_000, "abc", "tiny")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("start, end", [(2, 13), (12, 14), (5, 5), (6, 3)])
def test_blocks_that_do_not_exist_are_refused(start, end):
    with pytest.raises(BadRequest):
        checks.check_blocks(pb.BlockRange(start=start, end=end), BlockRange(2, 8), 12)


@pytest.mark.parametrize("start, end", [(0, 4), (2, 9), (8, 9), (0, 12)])
def test_blocks_that_are_elsewhere_by_now_are_to_be_looked_up(start, end):
    with pytest.raises(Draining, match="look up who holds them now"):
        checks.check_blocks(pb.BlockRange(start=start, end=end), BlockRange(2, 8), 12)


def test_blocks_that_are_here_are_returned():
    assert checks.check_blocks(pb.BlockRange(start=3, end=5), BlockRange(2, 8), 12) == BlockRange(3, 5)


def check(*shape: int, **kwargs: object) -> None:
    checks.check_batch_spec(spec(*shape, **kwargs), 16, LIMITS, max_tokens=100)


def test_hidden_states_of_allowed_shapes_pass():
    assert check(1, 100, 16) is None
    assert check(8, 12, 16, dtype=pb.DTYPE_BFLOAT16) is None


@pytest.mark.parametrize(
    "shape, error, sentence",
    [
        ((1, 16), BadRequest, r"must have the shape"),
        ((1, 1, 1, 16), BadRequest, r"must have the shape"),
        ((1, 4, 17), BadRequest, "hidden size is 16, the hidden states have 17"),
        ((9, 1, 16), BadRequest, "at most 8"),
        ((1, 101, 16), PromptTooLong, "1 x 101 tokens"),
        ((8, 13, 16), PromptTooLong, "8 x 13 tokens"),
        ((2**32 - 1, 2**32 - 1, 16), BadRequest, "at most 8"),
    ],
)
def test_hidden_states_of_other_shapes_are_refused(shape, error, sentence):
    with pytest.raises(error, match=sentence):
        check(*shape)


def test_one_token_for_each_sequence_always_fits():
    checks.check_batch_spec(spec(8, 1, 16), 16, LIMITS, max_tokens=4)


def test_integers_are_no_hidden_states_and_hidden_states_must_come():
    with pytest.raises(BadRequest, match="float32, float16 or bfloat16"):
        check(1, 4, 16, dtype=pb.DTYPE_INT64)
    with pytest.raises(ProtocolError, match="must carry hidden states"):
        checks.check_batch_spec(None, 16, LIMITS, max_tokens=100)


@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 15), (2, 1, 4, 16), (3, 4, 4, 16), (3, 1, 5, 16), (3, 1, 0, 16), (3, 4, 16)]
)
def test_prompts_that_do_not_fit_are_refused(shape):
    with pytest.raises(BadRequest, match="prompts must be floating point of shape"):
        checks.check_prompts_spec(spec(*shape), BlockRange(0, 3), 2, 16, LIMITS)


def test_prompts_that_fit_pass():
    for batch in (1, 2):
        checks.check_prompts_spec(spec(3, batch, 4, 16), BlockRange(0, 3), 2, 16, LIMITS)
    checks.check_prompts_spec(None, BlockRange(0, 3), 2, 16, LIMITS)
    with pytest.raises(BadRequest):
        checks.check_prompts_spec(spec(3, 1, 4, 16, dtype=pb.DTYPE_INT64), BlockRange(0, 3), 2, 16, LIMITS)


def test_masks_are_zeros_and_ones():
    checks.check_mask(None, 2, 3)
    checks.check_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), 2, 3)
    for bad in (torch.full((2, 3), 2), torch.full((2, 3), -1), torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 3)):
        with pytest.raises(BadRequest, match="attention_mask"):
            checks.check_mask(bad, 2, 3)


def test_positions_are_plausible():
    checks.check_position_ids(None, 2, 3)
    checks.check_position_ids(torch.arange(3)[None], 2, 3)
    for bad in (
        torch.full((2, 3), -1), torch.full((2, 3), 2**40), torch.zeros(2, 3), torch.zeros(3, 3, dtype=torch.int64),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="position_ids"):
            checks.check_position_ids(bad, 2, 3)


def test_a_gradient_looks_like_what_it_belongs_to():
    x = torch.zeros(2, 3, 4)
    assert checks.check_same_shape(x, x) is x
    for bad in (None, torch.zeros(2, 3, 5), torch.zeros(2, 3, 4, dtype=torch.int64)):
        with pytest.raises(BadRequest, match="grad_outputs of the same shape"):
            checks.check_same_shape(bad, x)


def test_beams_are_sequences_of_the_batch():
    checks.check_beam_idx([], 3)
    checks.check_beam_idx([2, 2, 0], 3)
    for bad in ([0, 1], [0, 1, 3], [0, 1, 2, 0], [2**32 - 1, 0, 0]):
        with pytest.raises(BadRequest, match="beam_idx must name 3 sequences"):
            checks.check_beam_idx(bad, 3)


def test_limits_are_positive():
    with pytest.raises(BadRequest, match="max_batch_size must be positive"):
        ServiceLimits(max_batch_size=0)


def test_a_step_names_what_later_hops_hold_of_no_more_hops_than_there_can_be_and_never_falling():
    checks.check_held([])
    checks.check_held([0, 5, 5, 9])
    with pytest.raises(ProtocolError, match="no hop may lack what a later one holds"):
        checks.check_held([5, 4])
    with pytest.raises(ProtocolError, match="later hops hold"):
        checks.check_held([0] * (checks.MAX_HOPS + 1))


@pytest.mark.parametrize(("held", "start", "rest"), [((), 10, ()), ((3, 20), 10, (20,)), ((12, 20), 12, (20,))])
def test_a_hop_passes_on_what_the_next_one_lacks(held, start, rest):
    x_BLD, y_BLD = torch.zeros(1, 4, 2), torch.arange(8.0).view(1, 4, 2)
    step = Step(10, 1, x_BLD, torch.ones(1, 4), torch.arange(10, 14)[None], held=held)
    further = step.passed_on(y_BLD)
    assert further is not None and (further.position, further.end, tuple(further.held)) == (start, 14, rest)
    assert torch.equal(further.x_BLD, y_BLD[:, start - 10 :])
    assert further.mask_BL is not None and further.mask_BL.shape == (1, 14 - start)
    assert further.position_ids_BL is not None and further.position_ids_BL.tolist() == [list(range(start, 14))]


def test_a_hop_passes_on_nothing_where_the_next_one_holds_all():
    assert Step(10, 0, torch.zeros(1, 4, 2), held=(14, 14)).passed_on(torch.zeros(1, 4, 2)) is None
