"""In how many bits a server holds its blocks: what "auto" means, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from swarm.embedded import EMBEDDED_MODEL
from swarm.errors import BadRequest, ResourceError
from swarm.model import quantization
from swarm.model.checkpoint import CheckpointSource
from swarm.server.config import ServerConfig, for_device
from swarm.server.hardware import memory_needs, pass_tokens
from swarm.server.placement import CACHE_TOKENS, RESERVE_FRACTION, MemoryNeeds, choose_quantization, plan_memory
from swarm.server.precision import Precision, choose_precision

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


def precision_of(name: str, **changes: object):
    model_config = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    for field, value in changes.items():
        setattr(model_config, field, value)
    config = ServerConfig(source=CheckpointSource(EMBEDDED_MODEL), quantization=name)
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


CUDA = torch.device("cuda")  # nothing is put there: what a block takes follows from its shapes


def on_cuda(name: str = "auto", *, free_blocks: float, num_blocks: int | None = None) -> Precision:
    """Where so many blocks of Llama 8B's shape, of four, have room in bfloat16."""
    model_config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=256, dtype=torch.bfloat16,
    )  # fmt: skip
    needs = memory_needs(model_config, torch.bfloat16, CUDA)
    one = needs.bytes_per_block + CACHE_TOKENS * needs.cache_bytes_per_token
    config = ServerConfig(source=CheckpointSource("any"), quantization=name, num_blocks=num_blocks)
    return choose_precision(config, model_config, CUDA, int(free_blocks * one / (1 - RESERVE_FRACTION)))


def test_on_cuda_auto_is_nf4_where_the_wanted_blocks_would_not_fit_otherwise():
    pytest.importorskip("bitsandbytes")
    assert on_cuda(free_blocks=4.1).quantization is None
    assert on_cuda(free_blocks=2.1).quantization == "nf4"
    assert on_cuda(free_blocks=2.1, num_blocks=2).quantization is None
    assert on_cuda(free_blocks=2.1, num_blocks=3).quantization == "nf4"
    assert on_cuda("none", free_blocks=2.1).quantization is None


def test_on_cuda_each_quantization_takes_what_its_bits_say():
    pytest.importorskip("bitsandbytes")
    sizes = {name: on_cuda(name, free_blocks=4.1).needs.bytes_per_block for name in ("none", "int8", "int4", "nf4")}
    assert 0.49 < sizes["int8"] / sizes["none"] < 0.52
    assert 0.25 < sizes["int4"] / sizes["none"] < 0.27 and 0.27 < sizes["nf4"] / sizes["none"] < 0.29


def test_without_bitsandbytes_auto_leaves_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert on_cuda(free_blocks=2.1).quantization is None
    with pytest.raises(ResourceError, match="nf4 on cuda needs bitsandbytes"):
        on_cuda("nf4", free_blocks=2.1)


def test_a_checkpoint_whose_kernels_take_one_dtype_is_served_in_it(monkeypatch: pytest.MonkeyPatch):
    class ForHalf:
        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            return torch.float16

        def preprocess_model(self, **_: object) -> None:
            pass

    monkeypatch.setattr(quantization, "get_hf_quantizer", lambda *_: (ForHalf(), None, None))
    precision = precision_of("auto", quantization_config={"quant_method": "awq", "bits": 4})
    assert precision.dtype == torch.float16 and str(precision) == "float16 with weights in awq"


def test_passes_are_longer_where_products_of_few_rows_wait_for_the_weights():
    config = ServerConfig(source=CheckpointSource("any"))
    on_cpu, on_gpu = for_device(config, "cpu"), for_device(config, "cuda")
    assert on_cpu == config
    assert on_gpu.limits.max_step_tokens == on_gpu.scheduler.max_tokens == pass_tokens("cuda") == 2048
    more = replace(config, limits=replace(config.limits, max_step_tokens=4096))
    assert for_device(more, "cuda").limits.max_step_tokens == 4096


def test_a_checkpoint_that_comes_quantized_is_not_quantized_again():
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    assert precision_of("auto", quantization_config=own).quantization == "fp8"
    with pytest.raises(BadRequest, match=r"comes quantized \(fp8\) and stays so"):
        precision_of("int8", quantization_config=own)
