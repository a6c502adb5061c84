"""The demo as a user runs it, and that nothing outlives it or the owner of a LocalSwarm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

TIMEOUT_S = 280
END_TIMEOUT_S = 40


@contextmanager
def tagged(*command: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], list[psutil.Process]]]]:
    """A running program, and a function that finds it and everything that it started."""
    tag = uuid.uuid4().hex

    def alive() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SWARM_TEST_TAG") == tag and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    environment = {**os.environ, "SWARM_TEST_TAG": tag, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process, alive
        finally:
            for each in alive():
                each.kill()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    text = ""
    while words not in text:
        line = process.stdout.readline()
        assert line, f"it ended before {words!r}: {text}"
        text += line
    return text


def wait_all_ended(alive: Callable[[], list[psutil.Process]]) -> None:
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while (left := alive()) and time.monotonic() < deadline_s:
        psutil.wait_procs(left, timeout=0.2)
    assert left == []


@pytest.mark.timeout(TIMEOUT_S + 20)
def test_the_demo_shows_all_five_parts_and_leaves_no_process() -> None:
    with tagged(sys.executable, "-m", "swarm.cli.app", "demo") as (process, alive):
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output
        assert [f"\n{part} " in output for part in range(1, 6)] == [True] * 5, output
        assert "A quick brown fox did not jump over the lazy dog\n" in output
        assert "The same text, with a pause" in output and "ratio" in output
        assert not any(word in output for word in ("Traceback", "WARNING", "Warning", "Error")), output
        wait_all_ended(alive)


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_says_so_in_one_line_and_leaves_no_process(number: signal.Signals) -> None:
    with tagged(sys.executable, "-m", "swarm.cli.app", "demo") as (process, alive):
        read_until(process, "1 Three servers" if number == signal.SIGTERM else "2 Text")
        process.send_signal(number)
        output, _ = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 130, output
        assert output.endswith("swarm: interrupted; all servers are stopped\n")
        assert "Traceback" not in output
        wait_all_ended(alive)


def test_local_servers_end_when_their_owner_is_killed(tiny_model: Callable[..., Path]) -> None:
    program = f"""
from swarm.server import LocalSwarm
with LocalSwarm({str(tiny_model())!r}, ranges=[(0, 1)]) as local:
    print("ready", flush=True)
    input()
"""
    with tagged(sys.executable, "-c", program) as (process, alive):
        read_until(process, "ready")
        assert len(alive()) >= 3, "the owner, its server, and the server's p2pd"
        process.kill()
        wait_all_ended(alive)
