"""The command line explains itself, and bad input gets one sentence and an exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from swarm.cli import app as cli

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def commands() -> list[str]:
    if not any(command.name == "serve" for command in cli.app.registered_commands):
        cli._register()
    group = typer.main.get_group(cli.app)
    return [name for name, command in group.commands.items() if not command.hidden]


def swarm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "swarm.cli.app", *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def assert_one_sentence(result: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == exit_code, result.stderr
    assert len(lines) == 1 and lines[0].startswith("swarm: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_every_command_shows_an_example(commands: list[str]) -> None:
    assert {
        "demo",
        "serve",
        "dht",
        "status",
        "doctor",
        "generate",
        "api",
        "version",
        "invite",
        "members",
        "revoke",
        "join",
    } <= set(commands)
    for name in commands:
        result = CliRunner().invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0, name
        assert f"Example: swarm {name}" in result.output, name


def test_a_wrong_flag_exits_with_2(commands: list[str]) -> None:
    for name in commands:
        result = CliRunner().invoke(cli.app, [name, "--no-such-flag"])
        assert result.exit_code == 2, name
        assert "No such option" in result.output, name


def test_an_unknown_command_exits_with_2(commands: list[str]) -> None:
    assert CliRunner().invoke(cli.app, ["no-such-command"]).exit_code == 2


def test_a_model_that_does_not_exist() -> None:
    assert_one_sentence(swarm("serve", "/does/not/exist"), 2, "/does/not/exist")


def test_a_join_link_that_is_none(tiny_model: Callable[..., Path]) -> None:
    assert_one_sentence(swarm("serve", str(tiny_model()), "--join", "http://example.org"), 2, "join link")
    assert_one_sentence(swarm("status", "--join", "swarm://v1.AAAA"), 2, "join link")


def test_a_join_link_that_is_missing() -> None:
    assert_one_sentence(swarm("status"), 2, "--join")


@pytest.mark.parametrize("blocks", ["3:1", "2:2", "a:b", "4"])
def test_blocks_that_are_no_range(tiny_model: Callable[..., Path], blocks: str) -> None:
    assert_one_sentence(swarm("serve", str(tiny_model()), "--blocks", blocks), 2, blocks)


def test_blocks_outside_the_model(tiny_model: Callable[..., Path]) -> None:
    assert_one_sentence(swarm("serve", str(tiny_model()), "--blocks", "0:99"), 2, "0:99", "blocks")


def test_a_port_in_use(tiny_model: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_sentence(swarm("serve", str(tiny_model()), "--port", str(port)), 1, str(port), "--port")


def test_a_port_that_cannot_be() -> None:
    assert_one_sentence(swarm("serve", "/does/not/exist", "--port", "70000"), 2, "70000")
