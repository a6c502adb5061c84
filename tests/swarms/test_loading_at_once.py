"""Servers and clients of one process may load at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import load_client_half
from swarm.model.span import load_span
from swarm.ranges import BlockRange


def test_loads_in_several_threads_leave_the_library_as_it_was(tiny_model):
    """The library's loader swaps the default dtype and weight tying for all threads."""
    checkpoint = Checkpoint.open(CheckpointSource(str(tiny_model("gpt2", tie_word_embeddings=True))))
    tie_weights = PreTrainedModel.tie_weights

    def load(number: int) -> torch.dtype:
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        if number % 3:
            span = load_span(checkpoint, BlockRange(0, 2), dtype=dtype, device="cpu")
            return span.dtype
        model = load_client_half(AutoModelForCausalLM, checkpoint, lambda *_, **__: None, dtype=dtype)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        return model.dtype

    with ThreadPoolExecutor(max_workers=6) as pool:
        dtypes = list(pool.map(load, range(24)))
    assert dtypes == [torch.float32, torch.bfloat16] * 12
    assert PreTrainedModel.tie_weights is tie_weights and torch.get_default_dtype() is torch.float32
