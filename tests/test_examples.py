"""The examples as a user runs them, in a short form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120


def run(example: str, *arguments: str) -> str:
    """Run an example to its end; return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_lora_teaches_a_way_of_speaking(tmp_path: Path) -> None:
    output = run("lora_chat_style.py", "--steps", "20", "--output", str(tmp_path / "adapter"))
    found = re.search(r"loss on new questions\D+([\d.]+)\D+([\d.]+)\D+([\d.]+)", output)
    assert found, output
    before, after, local = map(float, found.groups())
    assert after < before - 2 and local == pytest.approx(after, abs=0.01)
    assert "Aye, sailor!" in output and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
