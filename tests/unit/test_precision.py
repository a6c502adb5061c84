"""In how many bits a server holds its blocks: what "auto" means, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from swarm.embedded import EMBEDDED_MODEL
from swarm.errors import BadRequest, ResourceError
from swarm.model.checkpoint import CheckpointSource
from swarm.server.config import ServerConfig
from swarm.server.placement import MemoryNeeds, choose_quantization, plan_memory
from swarm.server.precision import choose_precision

GIB = 1 << 30
IN_FULL = MemoryNeeds(bytes_per_block=GIB, cache_bytes_per_token=1024)
IN_NF4 = MemoryNeeds(bytes_per_block=GIB * 9 // 32, cache_bytes_per_token=1024)


def choose(device_type: str = "cuda", *, free_gib: float, num_blocks: int, in_nf4: MemoryNeeds | None = IN_NF4) -> str:
    return choose_quantization(device_type, IN_FULL, in_nf4, free_bytes=int(free_gib * GIB), num_blocks=num_blocks)


def test_a_model_that_fits_stays_as_it_is():
    assert choose(free_gib=80, num_blocks=32) == "none"


def test_a_model_that_would_need_more_servers_is_served_in_nf4():
    assert choose(free_gib=24, num_blocks=32) == "nf4"
    assert choose(free_gib=24, num_blocks=80) == "nf4"


def test_blocks_that_were_asked_for_and_fit_stay_as_they_are():
    assert choose(free_gib=24, num_blocks=10) == "none"


def test_nothing_is_gained_where_not_one_block_fits_either_way():
    assert choose(free_gib=0.1, num_blocks=32) == "none"


def test_on_a_cpu_and_without_bitsandbytes_nothing_is_quantized_unasked():
    for device_type in ("cpu", "mps"):
        assert choose(device_type, free_gib=24, num_blocks=80) == "none"
    assert choose(free_gib=24, num_blocks=80, in_nf4=None) == "none"


@given(st.floats(0.1, 200), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_nf4_is_chosen_only_if_more_blocks_fit_with_it(free_gib, num_blocks):
    def fitting(needs: MemoryNeeds) -> int:
        try:
            return plan_memory(needs, free_bytes=int(free_gib * GIB), num_model_blocks=num_blocks).num_blocks
        except ResourceError:
            return 0

    if choose(free_gib=free_gib, num_blocks=num_blocks) == "nf4":
        assert fitting(IN_FULL) < num_blocks and fitting(IN_FULL) <= fitting(IN_NF4)


def precision_of(quantization: str, **changes: object):
    model_config = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    for name, value in changes.items():
        setattr(model_config, name, value)
    config = ServerConfig(source=CheckpointSource(EMBEDDED_MODEL), quantization=quantization)
    return choose_precision(config, model_config, torch.device("cpu"), GIB)


def test_a_block_of_few_bits_needs_less_memory():
    in_full, int8, int4 = (precision_of(name) for name in ("auto", "int8", "int4"))
    assert in_full.scheme is None and in_full.quantization is None and str(in_full) == "bfloat16"
    assert int8.quantization == "int8" and str(int8) == "bfloat16 with weights in int8"
    sizes = [each.needs.bytes_per_block for each in (in_full, int8, int4)]
    assert 0.49 < sizes[1] / sizes[0] < 0.55 and 0.25 < sizes[2] / sizes[0] < 0.45
    assert len({each.needs.cache_bytes_per_token for each in (in_full, int8, int4)}) == 1


def test_what_the_device_cannot_do_is_refused():
    with pytest.raises(ResourceError, match="nf4 runs on cuda, not on cpu"):
        precision_of("nf4")


def test_what_does_not_exist_is_refused():
    with pytest.raises(BadRequest, match="quantization must be one of auto, none, int8, int4, nf4, not 'int3'"):
        precision_of("int3")


def test_a_checkpoint_that_comes_quantized_is_not_quantized_again():
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    assert precision_of("auto", quantization_config=own).quantization == "fp8"
    with pytest.raises(BadRequest, match=r"comes quantized \(fp8\) and stays so"):
        precision_of("int8", quantization_config=own)
