"""What the benchmarks share: models made on the spot, servers on loopback, alternating samples, one JSON line."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import swarm
from swarm import AutoDistributedModelForCausalLM
from swarm.cli.app import OPENMP_SPINS
from swarm.codec import torch_dtype
from swarm.server import LocalSwarm

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "124M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}

VOCAB_SIZE = 32000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured: a shape, over so many servers."""

    shape: str
    num_servers: int
    num_samples: int
    dtype: str
    label: str
    serve_flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSetting(Setting):
    """The same, with one batch that every sample runs."""

    batch_size: int
    length: int


def new_parser(description: str, *, num_servers: int = 2, num_samples: int = 5) -> argparse.ArgumentParser:
    """The command line that all benchmarks have; starts the program anew where OpenMP threads would spin too long."""
    if "GOMP_SPINCOUNT" not in os.environ:
        # As `swarm` sets it for its own processes: both sides are measured under it. torch reads it when it is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GOMP_SPINCOUNT": OPENMP_SPINS})
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--servers", type=int, default=num_servers, metavar="N")
    parser.add_argument("--samples", type=int, default=num_samples, metavar="N")
    # On a processor without bfloat16 instructions, batches in bfloat16 take minutes; the ratio can be had in float32.
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--label", default="", help="what the plots call this result, for example 'before the engine'")
    parser.add_argument("--serve-flags", default="", help="further flags for the servers, for example '--threads 1'")
    return parser


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What `new_parser` has read."""
    return Setting(
        shape=arguments.shape,
        num_servers=arguments.servers,
        num_samples=arguments.samples,
        dtype=arguments.dtype,
        label=arguments.label,
        serve_flags=tuple(arguments.serve_flags.split()),
    )


def parse_setting(description: str, *, batch_size: int, length: int) -> BatchSetting:
    """Read the command line of the benchmarks that run one batch."""
    parser = new_parser(description)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--length", type=int, default=length)
    arguments = parser.parse_args()
    return BatchSetting(batch_size=arguments.batch_size, length=arguments.length, **asdict(setting_of(arguments)))


def make_model(shape: str, dtype: str, directory: str) -> LlamaForCausalLM:
    """Write a random Llama of this shape into the directory and return it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=8192, **SHAPES[shape])
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    return model


@contextmanager
def model_and_servers(setting: Setting) -> Iterator[tuple[LlamaForCausalLM, str, LocalSwarm]]:
    """Yield a model whole in this process, the directory it was saved in, and servers of it in their own processes.

    Who has no use for the model deletes it.
    """
    with tempfile.TemporaryDirectory() as directory:
        made = [make_model(setting.shape, setting.dtype, directory)]
        num_blocks = SHAPES[setting.shape]["num_hidden_layers"]
        cuts = [round(index * num_blocks / setting.num_servers) for index in range(setting.num_servers + 1)]
        ranges = list(itertools.pairwise(cuts))
        with LocalSwarm(directory, ranges, dtype=setting.dtype, arguments=setting.serve_flags, metrics=True) as servers:
            yield made.pop(), directory, servers


@contextmanager
def local_and_swarm(setting: Setting) -> Iterator[tuple[LlamaForCausalLM, Any]]:
    """Yield the same model twice: whole in this process, and over servers of their own processes."""
    with model_and_servers(setting) as (local, directory, servers):
        remote = AutoDistributedModelForCausalLM.from_pretrained(directory, join=servers.link)
        try:
            yield local, remote
        finally:
            remote.close()


def alternate(setting: Setting, local: Callable[[], int], remote: Callable[[], int]) -> dict[str, list[float]]:
    """Run both in turns; each returns the tokens it did. Returns tokens per second of each, a sample a turn."""
    local(), remote()
    rates: dict[str, list[float]] = {"local": [], "swarm": []}
    for _ in range(setting.num_samples):
        for name, work in (("local", local), ("swarm", remote)):
            started = time.perf_counter()
            num_tokens = work()
            rates[name].append(num_tokens / (time.perf_counter() - started))
    return rates


def ratios(rates: dict[str, list[float]]) -> dict[str, Any]:
    """The swarm against the local model: medians, their ratio, and how far the pairs of samples lie apart."""
    local, remote = statistics.median(rates["local"]), statistics.median(rates["swarm"])
    pairs = [fast / slow for fast, slow in zip(rates["swarm"], rates["local"], strict=True)]
    return {
        "local_tokens_per_s": rounded(local),
        "swarm_tokens_per_s": rounded(remote),
        "ratio": rounded(remote / local),
        "ratio_min_max": [rounded(min(pairs)), rounded(max(pairs))],
        "samples": {name: [rounded(rate) for rate in values] for name, values in rates.items()},
    }


def report(name: str, setting: Setting, rates: dict[str, list[float]], **more: Any) -> None:
    """Print the result of a benchmark that compares two rates as one JSON line."""
    print_result(name, setting, **ratios(rates), **more)


def print_result(name: str, setting: Setting, **results: Any) -> None:
    """Print the last line: what was measured, with what, where, and the results."""
    print(json.dumps({"benchmark": name, **asdict(setting), **results, **environment()}), flush=True)


def print_plain(name: str, **results: Any) -> None:
    """The same for benchmarks without servers."""
    print(json.dumps({"benchmark": name, **results, **environment()}), flush=True)


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit."""
    return {
        "versions": {
            "swarm": swarm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "git": _git_sha(),
    }


def say(text: str) -> None:
    """Tell whoever waits how far it is; results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The percentile of some values, interpolated; None where there are none."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def p50_p95(values: Sequence[float]) -> dict[str, float | None]:
    """Median and 95th percentile, as the results write them."""
    return {"p50": rounded(percentile(values, 50)), "p95": rounded(percentile(values, 95))}


def rounded(value: float | None) -> float | None:
    """Four significant digits, which is more than any of these measurements has."""
    return None if value is None else float(f"{value:.4g}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or sys.platform


def _git_sha() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
