"""The examples, in a short form, on servers that they share; one as a user starts it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matplotlib import image

from swarm import EMBEDDED_MODEL
from swarm.server import LocalSwarm

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def link() -> Iterator[str]:
    with LocalSwarm(EMBEDDED_MODEL, ranges=[(0, 3), (3, 6)], dtype="float32", in_process=True) as local:
        yield local.link


@pytest.fixture
def run(
    link: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Run an example to its end on the shared servers; return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_here(example: str, *arguments: str) -> str:
        import tuning

        monkeypatch.setattr(tuning.console, "_width", 160)
        main = runpy.run_path(str(EXAMPLES / example))["main"]
        main(["--join", link, *arguments])
        return capsys.readouterr().out

    return run_here


def numbers(output: str, row: str) -> list[float]:
    """The numbers in one row of a table."""
    found = re.search(rf"{row}\s*│(.*)", output)
    assert found, output
    return [float(each) for each in re.findall(r"-?[\d.]+", found[1])]


def assert_drawn(path: Path) -> None:
    """Assert that a PNG lies there in which something is drawn."""
    pixels = image.imread(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and pixels.shape[0] >= 300 and pixels.std() > 0.05


def run_alone(example: str, *arguments: str) -> str:
    """Run an example as a user starts it, with servers of its own; return what it printed."""
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_lora_teaches_a_way_of_speaking_to_somebody_who_has_no_swarm(tmp_path: Path) -> None:
    output = run_alone("lora_chat_style.py", "--steps", "20", "--output", str(tmp_path / "adapter"))
    before, after, local = numbers(output, "loss on new questions")
    assert after < before - 2 and local == pytest.approx(after, abs=0.01)
    assert "Aye, sailor!" in output and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert_drawn(tmp_path / "adapter" / "loss.png")


@pytest.mark.parametrize("seed", ["0", "1"])
def test_prompts_and_a_head_classify_as_well_as_trained_locally(run: Callable[..., str], seed: str) -> None:
    output = run("prompt_classifier.py", "--steps", "40", "--seed", seed)
    before, after, local = numbers(output, "right of 200 new sentences")
    assert after >= max(80, before + 15)
    assert abs(after - local) <= 1
    assert_drawn(Path("classifier-prompts", "loss.png"))


def test_ia3_learns_a_task_from_a_few_examples(run: Callable[..., str]) -> None:
    before, after = numbers(run("ia3_few_shot.py", "--steps", "30"), "right of 100 new sentences")
    assert after >= max(70, before + 10)
    assert_drawn(Path("few-shot-adapter", "loss.png"))


def test_embeddings_and_adapters_teach_a_language(run: Callable[..., str]) -> None:
    drawn = Path("elsewhere", "german.png")
    output = run("new_language.py", "--steps", "30", "--plot", str(drawn))
    before, after, local = numbers(output, "nats per character of new sentences")
    assert after < 0.7 * before and local == pytest.approx(after, abs=0.002)
    assert_drawn(drawn)


def test_an_adapter_makes_a_chatbot_personal_and_can_be_loaded_again(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, after = numbers(run("personal_chatbot.py", "--steps", "60", "--output", "mine"), "loss on new questions")
    assert after < before - 2
    assert_drawn(Path("mine", "loss.png"))
    said = iter(["What is the name of Mara's dog?", "Where does Mara live?", ""])
    monkeypatch.setattr("builtins.input", lambda *prompt: next(said))
    output = run("personal_chatbot.py", "--load", "mine", "--chat")
    assert numbers(output, "loss on new questions") == [pytest.approx(after, abs=0.002)]
    answers = re.findall(r"Bot: (.*)", output)
    assert len(answers) == 2 and "Luna" in answers[0]


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_hidden_states_tell_where_a_model_keeps_a_number() -> None:
    output = run_alone("activation_patching.py")
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
        runpy.run_path(str(EXAMPLES / "activation_patching.py"), run_name="__main__")
