"""A part of a span computes what a span loaded for these blocks alone computes, and shares the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

from swarm.errors import BadRequest
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.narrow import MAX_VIEWS, SpanViews, narrow
from swarm.model.span import Span, load_span
from swarm.ranges import BlockRange

TYPES = ["llama", "gemma2", "gpt_neo", "gpt2", "bloom", "jamba", "bamba", "qwen3_next", "deepseek_v3", "gpt_oss"]


def save(model_type: str, directory: Path) -> Checkpoint:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(directory)
    return Checkpoint.open(CheckpointSource(str(directory)))


def open_span(checkpoint: Checkpoint, blocks: BlockRange) -> Span:
    return load_span(checkpoint, blocks, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_view_equals_a_span_of_its_own(model_type: str, tmp_path: Path) -> None:
    checkpoint = save(model_type, tmp_path)
    whole = open_span(checkpoint, BlockRange(1, 4))
    for blocks in (BlockRange(1, 2), BlockRange(2, 4), BlockRange(3, 4)):
        own = open_span(checkpoint, blocks)
        view = narrow(narrow(whole, BlockRange(blocks.start, 4)), blocks)
        assert view.num_model_blocks == own.num_model_blocks == 4
        assert {p.data_ptr() for p in view.layers.parameters()} <= {p.data_ptr() for p in whole.parameters()}
        torch.manual_seed(1)
        x_BLD = torch.randn(2, 7, own.hidden_size)
        ours, theirs = view.new_cache(2), own.new_cache(2)
        with torch.no_grad():
            assert torch.equal(view(x_BLD), own(x_BLD))
            for part in (x_BLD[:, :5], x_BLD[:, 5:6], x_BLD[:, 6:]):
                assert torch.equal(view(part, cache=ours), own(part, cache=theirs))


def test_making_a_view_leaves_the_span_as_it_was(tmp_path: Path) -> None:
    checkpoint = save("llama", tmp_path)
    span = open_span(checkpoint, BlockRange(0, 4))
    x_BLD = torch.randn(1, 5, span.hidden_size)
    with torch.no_grad():
        before = span(x_BLD, cache=span.new_cache(1))
        narrow(span, BlockRange(2, 4))
        assert torch.equal(span(x_BLD, cache=span.new_cache(1)), before)


def test_views_are_bounded_and_outside_blocks_refused(tmp_path: Path) -> None:
    views = SpanViews(open_span(save("llama", tmp_path), BlockRange(1, 4)))
    assert views.view(BlockRange(1, 4)) is views.span
    assert views.view(BlockRange(2, 3)) is views.view(BlockRange(2, 3))
    assert len(views._views) <= MAX_VIEWS
    with pytest.raises(BadRequest, match="0:2"):
        views.view(BlockRange(0, 2))
