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
from collections.abc import Callable, Iterator
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
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: a shape, over so many servers."""

    shape: str
    num_servers: int
    num_samples: int
    batch_size: int
    length: int
    dtype: str


def parse_setting(description: str, *, batch_size: int, length: int) -> Setting:
    """Read the command line that all benchmarks have."""
    if "GOMP_SPINCOUNT" not in os.environ:
        # As `swarm` sets it for its own processes: both sides are measured under it. torch reads it when it is loaded.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GOMP_SPINCOUNT": OPENMP_SPINS})
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--length", type=int, default=length)
    # On a processor without bfloat16 instructions, batches in bfloat16 take minutes; the ratio can be had in float32.
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    return Setting(
        shape=arguments.shape,
        num_servers=arguments.servers,
        num_samples=arguments.samples,
        batch_size=arguments.batch_size,
        length=arguments.length,
        dtype=arguments.dtype,
    )


def make_model(shape: str, dtype: str, directory: str) -> LlamaForCausalLM:
    """Write a random Llama of this shape into the directory and return it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **SHAPES[shape])
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    return model


@contextmanager
def local_and_swarm(setting: Setting) -> Iterator[tuple[LlamaForCausalLM, Any]]:
    """Yield the same model twice: whole in this process, and over servers of their own processes."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        local = make_model(setting.shape, setting.dtype, directory)
        num_blocks = local.config.num_hidden_layers
        cuts = [round(index * num_blocks / setting.num_servers) for index in range(setting.num_servers + 1)]
        ranges = list(itertools.pairwise(cuts))
        with LocalSwarm(directory, ranges, dtype=setting.dtype) as servers:
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


def report(name: str, setting: Setting, rates: dict[str, list[float]], **more: Any) -> None:
    """Print the result as one JSON line."""
    local, remote = statistics.median(rates["local"]), statistics.median(rates["swarm"])
    pair_ratios = [fast / slow for fast, slow in zip(rates["swarm"], rates["local"], strict=True)]
    result = {
        "benchmark": name,
        **asdict(setting),
        "local_tokens_per_s": round(local, 2),
        "swarm_tokens_per_s": round(remote, 2),
        "ratio": round(remote / local, 3),
        "ratio_min_max": [round(min(pair_ratios), 3), round(max(pair_ratios), 3)],
        "samples": {key: [round(rate, 2) for rate in values] for key, values in rates.items()},
        **more,
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
    print(json.dumps(result))


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
