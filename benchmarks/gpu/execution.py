"""What the GPU benchmarks share: blocks of a shape on the device, run as the server's compute thread runs them.

The blocks have random weights and no client: hidden states come from the CPU and go back to it, as in a server.
"""

# B batch, L new tokens, T all new tokens of a row, D hidden

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from common import SHAPES, environment, rounded, say

from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.paged import PAGE_TOKENS
from swarm.model.quantization import AUTO, CHOICES, NONE, choose_scheme
from swarm.model.ragged import PackedSpan, Piece
from swarm.model.span import Span, load_span
from swarm.model.staging import Fetch
from swarm.ranges import BlockRange

BANDWIDTH_BYTES = 1 << 31
MATRIX_SIZE = 8192
EXECUTIONS = ("graphs", "modules", "single")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSetting:
    """What is measured, and where."""

    shape: str
    num_blocks: int
    device: str
    dtype: str
    num_samples: int
    executions: tuple[str, ...]
    """graphs: as the engine runs most families; modules: the same without recorded passes; single: with a Hugging Face
    cache, as it runs the others."""
    quantization: str


def new_gpu_parser(description: str, *, executions: str) -> argparse.ArgumentParser:
    """The command line that both have.

    Args:
        executions: those that are measured if nobody says which.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--num-blocks", type=int, default=0, help="0: all of the shape")
    parser.add_argument("--device", default="cuda", help="cpu: only to see whether the program works")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument(
        "--executions", default=executions, help=f"measured one after the other; all: {','.join(EXECUTIONS)}"
    )
    parser.add_argument("--quantization", choices=[each for each in CHOICES if each != AUTO], default=NONE)
    return parser


def read_setting(name: str, parser: argparse.ArgumentParser) -> tuple[GpuSetting, argparse.Namespace]:
    """Read the command line; without the device, say that nothing was measured and exit with 1."""
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        say(f"{name} did not run: torch finds no CUDA device here. It measures nothing without one.")
        print(json.dumps({"benchmark": name, "ran": False, "reason": "no CUDA device", **environment()}))
        sys.exit(1)
    setting = GpuSetting(
        shape=arguments.shape,
        num_blocks=arguments.num_blocks or SHAPES[arguments.shape]["num_hidden_layers"],
        device=arguments.device,
        dtype=arguments.dtype,
        num_samples=arguments.samples,
        executions=tuple(arguments.executions.split(",")),
        quantization=arguments.quantization,
    )
    return setting, arguments


def print_gpu_result(name: str, setting: GpuSetting, **results: Any) -> None:
    """Print the last line."""
    device = torch.cuda.get_device_name(setting.device) if setting.device.startswith("cuda") else "cpu"
    result = {"benchmark": name, "ran": True, **asdict(setting), "device_name": device, **results, **environment()}
    print(json.dumps(result), flush=True)


def random_span(setting: GpuSetting) -> Span:
    """Blocks of a Llama shape with random weights, loaded on the device as a server loads them."""
    shape = SHAPES[setting.shape] | {"num_hidden_layers": setting.num_blocks}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=8192, dtype=setting.dtype, **shape)
    config.architectures = ["LlamaForCausalLM"]
    device = torch.device(setting.device)
    with tempfile.TemporaryDirectory() as directory:
        _write_checkpoint(config, setting, Path(directory))
        return load_span(
            Checkpoint.open(CheckpointSource(directory)),
            BlockRange(0, setting.num_blocks),
            dtype=getattr(torch, setting.dtype),
            device=device,
            scheme=choose_scheme(setting.quantization, device.type),
        )


def _write_checkpoint(config: LlamaConfig, setting: GpuSetting, directory: Path) -> None:
    """One file for each block, so that no more than one is in memory."""
    config.save_pretrained(directory)
    torch.manual_seed(0)
    with torch.device("meta"):
        block = LlamaForCausalLM(config).model.layers[0]
    files: dict[str, str] = {}
    for number in range(setting.num_blocks):
        name = f"block-{number}.safetensors"
        tensors = {
            f"model.layers.{number}.{own_name}": _random(parameter.shape, setting)
            for own_name, parameter in block.named_parameters()
        }
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(shape: torch.Size, setting: GpuSetting) -> Tensor:
    dtype = getattr(torch, setting.dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape, device=setting.device, dtype=dtype) * 0.02).cpu()


class Sequences(Protocol):
    """Some sequences of equal length in the cache of a device."""

    used: Sequence[str]
    """Which ways of its own were found to work here: what is measured."""

    def step(self, x_BLD: Tensor) -> Tensor:
        """Append L tokens to each; hidden states from the CPU, and back to it."""

    def clear(self) -> None:
        """Make them empty again."""


class _Packed:
    """All of them in one row, each with its own run of slots."""

    def __init__(self, span: Span, num_sequences: int, capacity: int, *, with_graphs: bool) -> None:
        capacity = -(-capacity // PAGE_TOKENS) * PAGE_TOKENS  # each begins with a page, as the kernel wants it
        store = KVStore(kv_layout(span), num_sequences * capacity, scrap_slots=PAGE_TOKENS)
        self._packed = PackedSpan(span, store)
        if not with_graphs:
            self._packed.fast_paths.clear()
        self.used = [type(path).__name__ for path in self._packed.fast_paths]
        self.used += ["pages"] if self._packed.rows.pager is not None else []
        self._starts = [number * capacity for number in range(num_sequences)]
        self._length = 0

    def step(self, x_BLD: Tensor) -> Tensor:
        batch_size, length, hidden_size = x_BLD.shape
        end = self._length + length
        pieces = [Piece(length, self._length, [(start, start + end)]) for start in self._starts]
        with torch.inference_mode():
            y_TD = Fetch(self._packed(x_BLD.reshape(-1, hidden_size), pieces)).collect()
        self._length = end
        return y_TD.view(batch_size, length, hidden_size)

    def clear(self) -> None:
        self._length = 0


class _Single:
    """As one session of a batch, with a Hugging Face cache."""

    used = ()

    def __init__(self, span: Span, num_sequences: int) -> None:
        self._span, self._num_sequences = span, num_sequences
        self.clear()

    def step(self, x_BLD: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._span(x_BLD.to(self._span.device), cache=self._cache).cpu()

    def clear(self) -> None:
        self._cache = self._span.new_cache(self._num_sequences)


def open_sequences(execution: str, span: Span, num_sequences: int, capacity: int) -> Sequences:
    """Empty sequences that can grow to `capacity` tokens each."""
    if execution == "single":
        return _Single(span, num_sequences)
    return _Packed(span, num_sequences, capacity, with_graphs=execution == "graphs")


def weight_bytes(span: Span) -> int:
    """What a step reads of the blocks."""
    return sum(tensor.nbytes for tensor in (*span.layers.parameters(), *span.layers.buffers()))


def sample_s(setting: GpuSetting, work: Callable[[], object]) -> list[float]:
    """Seconds of each sample, after one to warm up."""
    return [_seconds(setting, work) for _ in range(setting.num_samples + 1)][1:]


def best_s(setting: GpuSetting, work: Callable[[], object]) -> float:
    """The shortest of several samples: what the device can do."""
    return min(_seconds(setting, work) for _ in range(10))


def bandwidth_bytes_per_s(setting: GpuSetting) -> float:
    """How fast the device's memory is read: the better of a copy and a sum over a large tensor."""
    num_bytes = BANDWIDTH_BYTES if setting.device.startswith("cuda") else 1 << 26
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=setting.device)
    target = torch.empty_like(source)
    copied = 2 * num_bytes / best_s(setting, lambda: target.copy_(source))
    return max(copied, num_bytes / best_s(setting, lambda: source.sum()))


def matrix_flops_per_s(setting: GpuSetting) -> float:
    """How fast the device multiplies large square matrices of the dtype."""
    size = MATRIX_SIZE if setting.device.startswith("cuda") else 256
    left = torch.randn(size, size, device=setting.device).to(getattr(torch, setting.dtype))
    return 2 * size**3 / best_s(setting, lambda: left @ left)


def summary(values: list[float]) -> dict[str, Any]:
    """Median, spread and samples."""
    return {
        "median": rounded(statistics.median(values)),
        "min_max": [rounded(min(values)), rounded(max(values))],
        "samples": [rounded(value) for value in values],
    }


def _seconds(setting: GpuSetting, work: Callable[[], object]) -> float:
    _synchronize(setting)
    started_s = time.perf_counter()
    work()
    _synchronize(setting)
    return time.perf_counter() - started_s


def _synchronize(setting: GpuSetting) -> None:
    if setting.device.startswith("cuda"):
        torch.cuda.synchronize(setting.device)
