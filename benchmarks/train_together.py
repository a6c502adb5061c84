"""What loss peers reach that train one adapter together, as a ratio to a single peer on the same total data.

    python benchmarks/train_together.py --samples 2

Runs examples/train_together.py: three peers of which one is killed and one joins on the way, then a single one; as many
updates, of as many exchanges each. A sample takes some two minutes; each has other random choices of exchanges.
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

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_together.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--steps", type=int, default=40, help="updates of each run")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    samples = [sample(seed, arguments.steps) for seed in seeds]
    print_plain(
        "train_together",
        steps=arguments.steps,
        ratio=statistics.median(each["ratio"] for each in samples),
        samples=samples,
    )


def sample(seed: int, num_updates: int) -> dict[str, Any]:
    """Run the example once."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(EXAMPLE), "--steps", str(num_updates), "--seed", str(seed)]
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
        "killed_after_update": max((each.get("update", 0) for each in together[1]), default=0),
        "joined_before_update": next((each["update"] for each in together[-1] if "update" in each), None),
        "num_samples": {"together": [final["num_samples"] for final in finals], "alone": alone["num_samples"]},
        "losses": {
            "together": [each["loss"] for each in together[0] if "update" in each],
            "alone": [each["loss"] for each in words["alone"] if "update" in each],
        },
        "seconds": time.monotonic() - began_s,
    }


if __name__ == "__main__":
    main()
