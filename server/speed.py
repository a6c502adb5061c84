"""How fast this server's blocks are before anybody uses them: run for a moment on the way that steps will take, for one
token, for several sequences at once and for a prompt, and remembered for the next start on the same hardware.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import swarm
from swarm.model import kernels
from swarm.model.span import Span

from .cores import POLL_S, Cores
from .execution import Executor
from .timing import CostModel

logger = logging.getLogger(__name__)

SHAPES = ((1, 1), (4, 1), (16, 1), (1, 256))
"""(sequences, new tokens of each) of the passes that are timed; those for which the cache has no room are left out."""

MEASURE_S = 0.25
"""Time spent on each, and at least one pass behind a first one that does not count."""

REMEMBERED_S = 7 * 86400.0
"""After so long it is measured again: drivers, clocks and neighbours change."""

MAX_REMEMBERED = 64

Tokens = Annotated[int, Field(ge=1, le=2**20)]
Seconds = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]


class Speed(BaseModel):
    """What passes through a whole span take."""

    model_config = ConfigDict(frozen=True)

    seconds: Annotated[dict[Tokens, Seconds], Field(min_length=1, max_length=32)]
    """By the number of tokens in the pass."""
    measured_at_s: float = 0.0
    """Unix time."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Of one sequence."""
        fewest = min(self.seconds)
        return fewest / self.seconds[fewest]

    def costs(self) -> CostModel:
        """What the scheduler knows before it has seen a pass."""
        costs = CostModel()
        for num_tokens, seconds in sorted(self.seconds.items()):
            costs.observe(num_tokens, seconds)
        return costs


class _Remembered(BaseModel):
    """The file: by what was measured, the latest last."""

    speeds: dict[str, Speed] = {}


@dataclass(frozen=True, slots=True)
class SpeedFile:
    """Speeds that were measured on this machine; without a path, none are.

    It only saves time: a file that is damaged or cannot be written is as none.
    """

    path: Path | None

    def find(self, what: str) -> Speed | None:
        """What was measured lately of the same."""
        speed = self._read().speeds.get(what)
        return speed if speed is not None and 0 <= time.time() - speed.measured_at_s < REMEMBERED_S else None

    def note(self, what: str, speed: Speed) -> None:
        """Remember a speed."""
        if self.path is None:
            return
        speeds = self._read().speeds
        speeds.pop(what, None)
        speeds = dict(list(speeds.items())[1 - MAX_REMEMBERED :]) | {what: speed}
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(_Remembered(speeds=speeds).model_dump_json())
            beside.replace(self.path)
        except OSError as exc:
            logger.debug("measured speeds are not remembered: %s", exc)
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def _read(self) -> _Remembered:
        if self.path is None:
            return _Remembered()
        try:
            return _Remembered.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _Remembered()
        except (OSError, ValidationError) as exc:
            logger.debug("measured speeds cannot be read, they are measured again: %s", exc)
            return _Remembered()


def describe(span: Span, fingerprint: str, precision: object, num_threads: int) -> str:
    """All that the speed of a span depends on."""
    parts = (
        hardware_name(span.device), f"{num_threads} threads", kernels.best_level().name, fingerprint, str(span.blocks),
        str(precision), f"torch {torch.__version__}", f"swarm {swarm.__version__}",
    )  # fmt: skip
    return " | ".join(parts)


def hardware_name(device: torch.device) -> str:
    """What computes, as its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_speed(executor: Executor, span: Span, cores: Cores) -> Speed:
    """Time passes through the real blocks, while nobody uses the cache; called in the compute thread."""
    while not cores.take_nowait():
        time.sleep(POLL_S)
    try:
        seconds: dict[int, float] = {}
        for num_rows, length in SHAPES:
            work = executor.trial(span, num_rows, length)
            if work is not None:
                seconds[num_rows * length] = _seconds_per_call(work, span.device)
        return Speed(seconds=seconds, measured_at_s=time.time())
    finally:
        cores.give_back()


def _seconds_per_call(work: Callable[[], object], device: torch.device) -> float:
    work()
    _synchronize(device)
    started_s, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started_s < MEASURE_S:
        work()
        _synchronize(device)
        count += 1
    return (time.perf_counter() - started_s) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
