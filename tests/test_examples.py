"""The examples as a user runs them, in a short form."""

from __future__ import annotations

import os
import re
import runpy
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


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_hidden_states_tell_where_a_model_keeps_a_number() -> None:
    output = run("activation_patching.py")
    rows = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 9:
            rows[cells[1]] = [int(cell.removesuffix("%")) for cell in cells[2:-1]]
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "the head"], output
    assert rows["0"] == [50, 0, 100, 0, 0, 0]  # before the first block, the last word knows nothing of the noun
    assert rows["the head"][1:] == [0, 0, 0, 0, 100]  # behind the last one, nothing but the last word counts
    assert all(rows[depth][0] >= 90 and rows[depth][2] > 50 for depth in "2345")
    assert rows["5"][5] > rows["2"][5] > 0


def test_a_plot_without_matplotlib_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["activation_patching.py", "--plot", "here.png"])
    with pytest.raises(SystemExit, match="--plot needs matplotlib: run `pip install matplotlib`"):
        runpy.run_path(str(ROOT / "examples" / "activation_patching.py"), run_name="__main__")
