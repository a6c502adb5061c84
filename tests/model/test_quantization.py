"""Spans with quantized weights compute what the rounded weights say; what comes quantized stays as it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from exact import SpanChain, save_tiny
from safetensors.torch import load_file, save_file
from tiny_configs import tiny_config
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from swarm.errors import BadCheckpoint, BadRequest, ResourceError, UnsupportedModel
from swarm.model.anatomy import anatomy_of, base_class_of
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import load_client_half
from swarm.model.narrow import narrow
from swarm.model.quantization import Scheme, block_bytes, choose_scheme, keep_differentiable, own_quantization
from swarm.model.span import Span, load_span
from swarm.model.weight_only import WeightOnlyLinear
from swarm.ranges import BlockRange

BLOCKS = BlockRange(1, 4)
TYPES = ["llama", "gpt2", "falcon", "gemma2", "mixtral", "qwen3_next", "jamba", "deepseek_v3", "olmo"]

FULL_TOLERANCE = {"int8": 0.03, "int4": 0.4}
"""Root mean square of the difference to the weights as they were, in those of the hidden states: random weights have
no structure that would survive rounding, trained ones lose less (tests/swarms/test_quantized.py)."""

SAME_WEIGHTS_TOLERANCE = 2e-3
"""Largest difference to the rounded weights in floats, float32, in standard deviations: three blocks of products with
activations in 16 bits of fixed point."""


def wide_config(model_type: str) -> PretrainedConfig:
    """A tiny config whose matrices are wide enough to be quantized."""
    config = tiny_config(model_type)
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            setattr(config, name, 128)
    return config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Checkpoint] = {}

    def make(model_type: str = "llama") -> Checkpoint:
        if model_type not in made:
            directory = tmp_path_factory.mktemp(model_type)
            save_tiny(directory, wide_config(model_type))
            made[model_type] = Checkpoint.open(CheckpointSource(str(directory)))
        return made[model_type]

    return make


def scheme_of(name: str, device_type: str = "cpu") -> Scheme:
    scheme = choose_scheme(name, device_type)
    assert scheme is not None
    return scheme


def open_span(checkpoint: Checkpoint, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32) -> Span:
    return load_span(checkpoint, BLOCKS, dtype=dtype, device="cpu", scheme=scheme)


def quantized_layers(span: Span) -> dict[str, WeightOnlyLinear]:
    return {name: module for name, module in span.named_modules() if isinstance(module, WeightOnlyLinear)}


def with_weights_of(span: Span, quantized: Span) -> Span:
    """A span in floats with the weights that the quantized one rounded to."""
    for name, layer in quantized_layers(quantized).items():
        module = span.get_submodule(name)
        weight = layer.weight.t() if type(module).__name__ == "Conv1D" else layer.weight
        module.weight.data.copy_(weight)
    return span


def rms(difference: Tensor, reference: Tensor) -> float:
    return float(difference.pow(2).mean().sqrt() / reference.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_quantized_span_computes_what_its_weights_say(checkpoints, model_type: str, name: str) -> None:
    checkpoint, scheme = checkpoints(model_type), scheme_of(name)
    quantized, full = open_span(checkpoint, scheme), open_span(checkpoint)
    assert quantized_layers(quantized) and quantized.dtype == torch.float32
    x_BLD = torch.randn(2, 7, full.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y_BLD, in_full_BLD = quantized(x_BLD), full(x_BLD)
        reference = with_weights_of(full, quantized)
        exact_BLD = reference(x_BLD)
        assert (y_BLD - exact_BLD).abs().max() <= SAME_WEIGHTS_TOLERANCE * exact_BLD.std()
        assert rms(y_BLD - in_full_BLD, in_full_BLD) < FULL_TOLERANCE[name]
        ours, theirs = quantized.new_cache(2), reference.new_cache(2)
        for part_BLD in (x_BLD[:, :5], x_BLD[:, 5:6], x_BLD[:, 6:]):
            y_BLD, exact_BLD = quantized(part_BLD, cache=ours), reference(part_BLD, cache=theirs)
            assert (y_BLD - exact_BLD).abs().max() <= SAME_WEIGHTS_TOLERANCE * exact_BLD.std()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_gradients_flow_through_a_quantized_span(checkpoints, name: str) -> None:
    quantized = open_span(checkpoints(), scheme_of(name))
    reference = with_weights_of(open_span(checkpoints()), quantized)
    x_BLD = torch.randn(2, 7, quantized.hidden_size)
    gradients = []
    for span in (quantized, reference):
        leaf_BLD = x_BLD.clone().requires_grad_()
        span(leaf_BLD).pow(2).mean().backward()
        gradients.append(leaf_BLD.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 5e-3 * gradients[1].std()
    assert all(parameter.grad is None for parameter in quantized.parameters())


def test_bfloat16_is_what_it_computes_in(checkpoints) -> None:
    span = open_span(checkpoints(), scheme_of("int8"), torch.bfloat16)
    reference = with_weights_of(open_span(checkpoints()), span)
    x_BLD = torch.randn(1, 5, span.hidden_size).to(torch.bfloat16)
    with torch.no_grad():
        y_BLD, exact_BLD = span(x_BLD), reference(x_BLD.float())
    assert y_BLD.dtype == span.dtype == torch.bfloat16
    assert rms(y_BLD.float() - exact_BLD, exact_BLD) < 0.02


def test_a_view_shares_the_quantized_weights(checkpoints) -> None:
    span = open_span(checkpoints(), scheme_of("int4"))
    view = narrow(span, BlockRange(2, 4))
    held = {buffer.data_ptr() for buffer in span.layers.buffers()}
    shared = [buffer for layer in quantized_layers(view).values() for buffer in layer.buffers()]
    assert shared and all(buffer.data_ptr() in held for buffer in shared)
    x_BLD = torch.randn(1, 5, span.hidden_size)
    own = load_span(checkpoints(), BlockRange(2, 4), dtype=torch.float32, device="cpu", scheme=scheme_of("int4"))
    with torch.no_grad():
        assert torch.equal(view(x_BLD), own(x_BLD))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_the_plan_knows_what_a_quantized_block_takes(checkpoints, model_type: str, name: str) -> None:
    checkpoint, scheme = checkpoints(model_type), scheme_of(name)
    span = open_span(checkpoint, scheme, torch.bfloat16)
    with torch.device("meta"):
        base = base_class_of(checkpoint.config)(checkpoint.config)
    planned = [block_bytes(layer, torch.bfloat16, scheme) for layer in anatomy_of(checkpoint.config).find_layers(base)]
    held = [sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())) for layer in span.layers]
    assert planned[1:] == held


def test_experts_stay_in_floats_and_the_log_says_so(checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="swarm.model.quantization"):
        span = open_span(checkpoints("mixtral"), scheme_of("int8"))
    experts = [name for name, parameter in span.named_parameters() if "experts" in name and parameter.dim() == 3]
    assert experts and all(parameter.is_floating_point() for parameter in span.parameters())
    assert any("stay in floats" in message and "experts" in message for message in caplog.messages)


def test_a_matrix_of_another_shape_than_the_config_says(tmp_path: Path) -> None:
    save_tiny(tmp_path, wide_config("llama"))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:64].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"layers\.2\.mlp\.up_proj\.weight has the shape"):
        open_span(Checkpoint.open(CheckpointSource(str(tmp_path))), scheme_of("int8"))


def test_a_quantized_part_that_is_missing(tmp_path: Path) -> None:
    save_tiny(tmp_path, wide_config("llama"))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="lacks 1 tensors"):
        open_span(Checkpoint.open(CheckpointSource(str(tmp_path))), scheme_of("int8"))


# Which quantization where


@pytest.mark.parametrize(
    "name, device_type, found",
    [("none", "mps", None), ("int8", "cpu", "cpu"), ("int4", "cpu", "cpu"), ("nf4", "cuda", "cuda"),
     ("int8", "cuda", "cuda"), ("int4", "cuda", "cuda")],
)  # fmt: skip
def test_each_kind_of_device_has_its_schemes(name: str, device_type: str, found: str | None) -> None:
    scheme = choose_scheme(name, device_type)
    assert (scheme and (scheme.name, scheme.device_type)) == (found and (name, found))


@pytest.mark.parametrize(
    "name, device_type, sentence",
    [
        ("nf4", "cpu", "nf4 runs on cuda, not on cpu: use --quantization int8 or int4 or none, or another --device"),
        ("int8", "mps", "int8 runs on cpu and cuda, not on mps: use --quantization none, or another --device"),
    ],
)
def test_a_device_that_cannot_do_it_is_said(name: str, device_type: str, sentence: str) -> None:
    with pytest.raises(ResourceError) as caught:
        choose_scheme(name, device_type)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["int3", "", "auto"])
def test_a_quantization_that_does_not_exist(name: str) -> None:
    with pytest.raises(BadRequest, match="quantization must be one of auto, none, int8, int4, nf4"):
        choose_scheme(name, "cpu")


# Checkpoints that come quantized


def save_fp8(directory: Path) -> dict[str, Tensor]:
    """A checkpoint in blocks of 8-bit floats, as the library's FineGrainedFP8 reads it; returns its weights."""
    config = wide_config("llama")
    save_tiny(directory, config)
    path = directory / "model.safetensors"
    tensors, weights = load_file(path), {}
    for name in [name for name in tensors if name.startswith("model.layers.") and name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(rows // 32, columns // 32)
        weights[name] = (tensors[name].float().view_as(blocks) * scale).view(rows, columns)
    save_file(tensors, path, metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    write_quantization(directory, settings)
    return weights


def write_quantization(directory: Path, settings: dict[str, object]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the library keeps the 8 bits, and its kernels round")
def test_an_fp8_checkpoint_is_read_as_its_weights_say(tmp_path: Path) -> None:
    weights = save_fp8(tmp_path)
    checkpoint = Checkpoint.open(CheckpointSource(str(tmp_path)))
    assert own_quantization(checkpoint.config) == "fp8"
    span = open_span(checkpoint)
    found = span.layers[0].self_attn.q_proj.weight
    assert torch.allclose(found.float(), weights["model.layers.1.self_attn.q_proj.weight"], rtol=0.01, atol=1e-6)
    x_BLD = torch.randn(1, 5, span.hidden_size)
    with torch.no_grad():
        assert span(x_BLD).isfinite().all()


@pytest.mark.parametrize(
    "settings, error, sentence",
    [
        ({"quant_method": "torchao"}, UnsupportedModel, "quantized with torchao"),
        ({"quant_method": "vptq"}, ResourceError, "quantized with vptq, which cannot run here"),
        ({"quant_method": "awq", "bits": 4}, ResourceError, "quantized with awq, which cannot run here: .*gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, ResourceError, "quantized with gptq, which cannot run here: .*optimum"),
        ({"quant_method": "no-such-method"}, UnsupportedModel, "which transformers does not know"),
    ],
)
def test_what_cannot_be_loaded_as_it_comes_is_refused(tmp_path: Path, settings, error, sentence) -> None:
    save_tiny(tmp_path, wide_config("llama"))
    write_quantization(tmp_path, settings)
    with pytest.raises(error, match=sentence):
        open_span(Checkpoint.open(CheckpointSource(str(tmp_path))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_client_keeps_its_head_in_few_bits(tmp_path: Path, name: str, tied: bool) -> None:
    config = wide_config("llama")
    config.tie_word_embeddings = tied
    checkpoint = Checkpoint.open(CheckpointSource(str(save_tiny(tmp_path, config))))
    call = SpanChain([])
    whole, client = (
        load_client_half(AutoModelForCausalLM, checkpoint, call, dtype=torch.float32, quantization=bits)
        for bits in ("none", name)
    )
    head, embeddings = client.get_output_embeddings(), client.get_input_embeddings()
    assert isinstance(head, WeightOnlyLinear)
    assert torch.equal(embeddings.weight, whole.get_input_embeddings().weight)
    x_BLD = torch.randn(1, 5, config.hidden_size).requires_grad_()
    wanted = torch.nn.functional.linear(x_BLD, head.weight)
    assert rms(head(x_BLD) - wanted, wanted) < 1e-3
    assert rms(head.weight - whole.get_output_embeddings().weight, head.weight) < (0.01 if name == "int8" else 0.15)
    head(x_BLD).pow(2).mean().backward()
    assert x_BLD.grad is not None and x_BLD.grad.abs().sum() > 0


def test_what_has_no_head_or_no_such_kernel_says_so(checkpoints) -> None:
    with pytest.raises(UnsupportedModel, match="no head that can be kept in int8"):
        load_client_half(AutoModel, checkpoints(), SpanChain([]), quantization="int8")
    with pytest.raises(ResourceError, match="nf4 runs on cuda, not on cpu"):
        load_client_half(AutoModelForCausalLM, checkpoints(), SpanChain([]), quantization="nf4")


# bitsandbytes, which is for CUDA; what it has for CPUs runs here, up to the device


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_bitsandbytes_rounds_as_it_does_for_the_library(checkpoints, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint, scheme = checkpoints(), scheme_of(name, "cuda")
    span = open_span(checkpoint, scheme)
    whole = AutoModelForCausalLM.from_pretrained(
        checkpoint.name, dtype=torch.float32, device_map={"": "cpu"}, **scheme.loader_arguments(torch.float32)
    )
    for ours, theirs in zip(span.layers, whole.model.layers[1:], strict=True):
        for name_, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name_)), name_
    x_BLD = torch.randn(1, 5, span.hidden_size).requires_grad_()
    span(x_BLD).pow(2).mean().backward()
    assert x_BLD.grad is not None and x_BLD.grad.abs().sum() > 0
    in_full = open_span(checkpoint)
    with torch.no_grad():
        assert rms(span(x_BLD) - in_full(x_BLD), in_full(x_BLD)) < 0.4
        assert torch.equal(narrow(span, BlockRange(2, 4))(x_BLD).isfinite(), torch.ones_like(x_BLD).bool())


def test_what_others_send_does_not_change_a_result_in_8_bits(checkpoints) -> None:
    pytest.importorskip("bitsandbytes")
    span = open_span(checkpoints(), scheme_of("int8", "cuda"))
    x_BLD = torch.randn(2, 4, span.hidden_size)
    with torch.no_grad():
        alone = span(x_BLD)[0]
        x_BLD[1, :, 3] = 500.0  # far beyond what the library takes for an outlier
        assert torch.equal(span(x_BLD)[0], alone)


def test_a_bitsandbytes_checkpoint_stays_as_it_is_and_passes_gradients(checkpoints, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(
        checkpoints().name, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    whole.save_pretrained(tmp_path)
    keep_differentiable(whole)
    checkpoint = Checkpoint.open(CheckpointSource(str(tmp_path)))
    assert own_quantization(checkpoint.config) == "bitsandbytes"
    span = open_span(checkpoint)
    x_BLD = torch.randn(1, 5, span.hidden_size)

    def gradient() -> Tensor:
        x = x_BLD.clone().requires_grad_()
        span(x).pow(2).mean().backward()
        assert x.grad is not None
        return x.grad

    loaded, before = {name: each.clone() for name, each in span.named_parameters()}, gradient()
    hidden = []
    for layer in (whole.model.layers[0], whole.model.layers[3]):
        layer.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        whole(inputs_embeds=x_BLD, use_cache=False)
        assert torch.equal(span(hidden[0]), hidden[1])
    assert torch.equal(gradient(), before)  # after a pass without gradients, as before it
    assert all(torch.equal(each, loaded[name]) for name, each in span.named_parameters())
