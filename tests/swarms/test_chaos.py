"""A few of the runs of benchmarks/chaos.py: servers are killed, frozen, slowed down, cut off and told to leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
TIMEOUT_S = 400


def test_whatever_happens_to_servers_tokens_and_gradients_stay_the_same():
    command = [sys.executable, str(SCRIPT), "--runs", "8", "--training-runs", "4", "--tokens", "32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["generation"]["right"] == 8 and found["training"]["right"] == 4
    assert sum(found["generation"]["events"].values()) >= 8
