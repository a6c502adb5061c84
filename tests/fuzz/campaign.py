"""Feeds targets with malformed inputs and says what it took: for CI a few, for nights many (`scripts/fuzz`).

scripts/fuzz --inputs 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation import malformed
from targets import Target, all_targets

MAX_S = 1.0
"""Longer is a hang: inputs are small."""

MAX_ALLOCATED_BYTES = 4 * 2**20
"""What one input may have Python allocate at a time: 256 times the largest one."""

MAX_GROWTH_BYTES = 96 * 2**20
"""What a whole campaign may add to the memory of the process, torch's included."""

MEASURED_EVERY = 64
"""Counting allocations takes long, so it is done for some inputs, and for all that are slow."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one target did with its inputs."""

    target: str
    num_inputs: int
    num_refused: int
    slowest_ms: float
    most_allocated_bytes: int
    failures: tuple[str, ...]
    """Inputs, as hexadecimal digits, and what was wrong with them."""


def feed(target: Target, data: bytes, clock: Callable[[], float] = time.perf_counter) -> tuple[bool, float, str]:
    """Hand one input over; return whether it was refused, how long that took, and what is wrong with that."""
    began_s = clock()
    refused, wrong = False, ""
    try:
        target.run(data)
    except target.expected:
        refused = True
    except Exception as exc:  # a bug: it is what is looked for
        wrong = f"{type(exc).__name__}: {exc}"
    took_s = clock() - began_s
    return refused, took_s, wrong


def warm_up(targets: Sequence[Target]) -> None:
    """Let libraries import what they need for good inputs, which counts for none of the malformed ones."""
    for target in targets:
        for data in target.corpus():
            feed(target, data)


def run(target: Target, num_inputs: int, seed: int) -> Outcome:
    """Feed one target; go on after failures."""
    rng = random.Random(f"{target.name} {seed}")
    corpus, failures = target.corpus(), []
    num_refused, slowest_s, most_bytes = 0, 0.0, 0
    for number, data in zip(range(num_inputs), _inputs(corpus, rng), strict=False):
        refused, took_s, wrong = feed(target, data, time.thread_time)
        if number % MEASURED_EVERY == 0 or took_s > MAX_S / 4:
            most_bytes = max(most_bytes, allocated := _allocated_bytes(target, data))
            if allocated > MAX_ALLOCATED_BYTES:
                wrong = wrong or f"allocates {allocated} bytes"
        if took_s > MAX_S:
            wrong = wrong or f"takes {took_s:.1f} s"
        if wrong:
            failures.append(f"{data.hex()}: {wrong}")
        num_refused, slowest_s = num_refused + refused, max(slowest_s, took_s)
    return Outcome(target.name, num_inputs, num_refused, round(1e3 * slowest_s, 2), most_bytes, tuple(failures[:20]))


def _inputs(corpus: Sequence[bytes], rng: random.Random) -> Sequence[bytes]:
    yield from corpus
    yield from malformed(corpus, rng)


def _allocated_bytes(target: Target, data: bytes) -> int:
    tracemalloc.start()
    feed(target, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def memory_bytes() -> int:
    """The most that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, with commas")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = all_targets(Path(folder))
        warm_up(targets)
        chosen = [each for each in targets if not arguments.only or each.name in arguments.only.split(",")]
        began_s, before = time.monotonic(), memory_bytes()
        outcomes = []
        for target in chosen:
            outcomes.append(run(target, share(target, chosen, arguments.inputs), arguments.seed))
            print(json.dumps(asdict(outcomes[-1])), file=sys.stderr)
    grown = memory_bytes() - before
    failed = [each.target for each in outcomes if each.failures]
    total = {"inputs": sum(each.num_inputs for each in outcomes), "seconds": round(time.monotonic() - began_s)}
    slowest_ms = max(each.slowest_ms for each in outcomes)
    print(json.dumps(total | {"failed": failed, "slowest_ms": slowest_ms, "grown_mb": round(grown / 1e6, 1)}))
    if failed or grown > MAX_GROWTH_BYTES:
        raise SystemExit(1)


def share(target: Target, targets: Sequence[Target], num_inputs: int) -> int:
    """How many of the inputs a target gets: those that read files are slow, and have few."""
    weights = {each.name: 1 / 16 if each.name in ("shard", "config") else 1.0 for each in targets}
    return round(num_inputs * weights[target.name] / sum(weights.values()))


if __name__ == "__main__":
    main()
