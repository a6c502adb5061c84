"""What loss peers reach that train together, as a ratio to a single peer on the same total data.

    python benchmarks/train_together.py --samples 2
    python benchmarks/train_together.py --example pretrain_together

Runs examples/train_together.py: three peers of which one is killed and one joins on the way train an adapter, then a
single one does; as many updates, of as much data each. Or examples/pretrain_together.py: three peers train a model from
nothing. A sample takes some three minutes; each has other random choices of data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import print_plain

EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=("train_together", "pretrain_together"), default="train_together")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--steps", type=int, help="updates of each run; default: as the example has it")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    samples = [sample(arguments.example, seed, arguments.steps) for seed in seeds]
    print_plain(
        arguments.example,
        ratio=statistics.median(each["ratio"] for each in samples),
        samples=samples,
    )


def sample(example: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Run an example once."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(EXAMPLES / f"{example}.py"), "--seed", str(seed)]
        command += [] if steps is None else ["--steps", str(steps)]
        done = subprocess.run([*command, "--output", directory], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, file=sys.stderr)
    words = json.loads(done.stdout.splitlines()[-1])
    together, alone = words["peers"], words["alone"][-1]
    finals = [said[-1] for said in together if said and "after" in said[-1]]
    return {
        "seed": seed,
        "before": alone["before"],
        "together": [final["after"] for final in finals],
        "alone": alone["after"],
        "ratio": statistics.mean(final["after"] for final in finals) / alone["after"],
        "updates": [[each["update"] for each in said if "update" in each] for said in together],
        "num_samples": {"together": [final["num_samples"] for final in finals], "alone": alone["num_samples"]},
        "losses": {"together": by_update(together[0]), "alone": by_update(words["alone"])},
        "seconds": time.monotonic() - began_s,
    }


def by_update(said: list[dict[str, Any]]) -> list[float | None]:
    """A peer's losses; None for updates in which it had no part."""
    found = {each["update"]: each["loss"] for each in said if "update" in each}
    return [found.get(number) for number in range(1, max(found) + 1)]


if __name__ == "__main__":
    main()
