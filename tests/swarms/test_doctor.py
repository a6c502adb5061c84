"""`swarm doctor` on loopback: what it finds, what it advises, how it exits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from swarm import PROTOCOL_VERSION
from swarm.cli import app as cli
from swarm.cli.doctor import _print
from swarm.diagnosis import ModelCheck, OwnCheck, PeerCheck, Report, ServerCheck, advice
from swarm.errors import BadRequest
from swarm.ranges import BlockRange
from swarm.reach import Reach
from swarm.server import LocalSwarm

SERVER = ServerCheck(
    name="home",
    peer_id="QmServer",
    blocks=BlockRange(0, 4),
    state="online",
    protocol_version=PROTOCOL_VERSION,
    way="direct",
)
MODEL = ModelCheck(name="tiny", num_blocks=4, servers=(SERVER,))
PEER = PeerCheck(peer_id="QmPeer", multiaddrs=("/ip4/8.8.8.8/tcp/1/p2p/QmPeer",), relays=True)
OWN = OwnCheck(port=31330, is_chosen=True, seen_as=("8.8.8.8",), is_translated=True, reach=Reach(missed=("8.8.8.8",)))
REPORT = Report(own=OWN, peers=(PEER,), models=(MODEL,))


def with_server(**changes: Any) -> Report:
    return replace(REPORT, models=(replace(MODEL, servers=(replace(SERVER, **changes),)),))


@pytest.mark.parametrize(
    ("report", "is_complete", "words"),
    [
        (REPORT, True, ["open TCP port 31330", "forward", "All 4 blocks of tiny"]),
        (replace(REPORT, own=replace(OWN, reach=Reach(reached=("8.8.8.8",)))), True, ["Others can dial this machine"]),
        (replace(REPORT, own=replace(OWN, reach=Reach())), True, ["Nobody could try"]),
        (replace(REPORT, peers=(replace(PEER, relays=False),)), True, ["No peer of the join link relays"]),
        (replace(REPORT, peers=(replace(PEER, error="timeout"),)), True, ["Peer QmPeer", "does not answer"]),
        (replace(REPORT, peers=(replace(PEER, clock_offset_s=-3600.0),)), True, ["differ by 3600 s"]),
        (with_server(way="relay", relay_id="QmPeer"), True, ["through relay QmPeer"]),
        (with_server(way="", error="no way"), False, ["cannot be reached: no way", "Blocks 0-3 of tiny"]),
        (with_server(state="draining"), False, ["Blocks 0-3 of tiny"]),
        (with_server(protocol_version=1), False, ["speaks protocol 1"]),
        (with_server(blocks=BlockRange(1, 4)), False, ["Blocks 0 of tiny"]),
        (replace(REPORT, models=()), False, ["Nobody serves a model here yet"]),
    ],
)  # fmt: skip
def test_what_was_found_becomes_sentences(report: Report, is_complete: bool, words: list[str]) -> None:
    text = " ".join(advice(report))
    assert report.is_complete is is_complete
    assert all(word in text for word in words), text


def test_names_of_strangers_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = replace(MODEL, name="[/]", servers=(replace(SERVER, name="[/b]"),))
    _print(replace(REPORT, models=(names,)))
    shown = capsys.readouterr().out
    assert "[/]: 4 blocks" in shown and "│ [/b] " in shown


@pytest.fixture(scope="module")
def swarm(tiny_model: Callable[..., Path]) -> Iterator[LocalSwarm]:
    with LocalSwarm(str(tiny_model("llama")), [(0, 3), (3, 6)], dtype="float32", in_process=True) as local:
        yield local


def doctor(*arguments: str) -> Any:
    if not any(command.name == "serve" for command in cli.app.registered_commands):
        cli._register()
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_a_whole_swarm_can_be_reached(swarm: LocalSwarm) -> None:
    result = doctor("--join", swarm.link, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["own"]["reach"]["reached"] == ["127.0.0.1"] and not report["own"]["is_translated"]
    assert [peer["error"] for peer in report["peers"]] == ["", ""]
    [model] = report["models"]
    assert [server["way"] for server in model["servers"]] == ["direct", "direct"]
    for server in model["servers"]:
        assert 0 < server["rtt_s"] < 1 and server["upload_bytes_per_s"] > 0 and server["download_bytes_per_s"] > 0
        assert abs(server["clock_offset_s"]) < 1 and server["protocol_version"] == PROTOCOL_VERSION


def test_one_that_lacks_blocks_exits_with_1_and_says_which(swarm: LocalSwarm, tiny_model: Callable[..., Path]) -> None:
    with LocalSwarm(str(tiny_model("llama")), [(0, 2)], dtype="float32", in_process=True) as part:
        result = doctor("--join", part.link)
    assert result.exit_code == 1, result.output
    assert "Blocks 2-5 of" in result.stdout and "direct" in result.stdout


def test_a_model_that_nobody_serves_is_a_usage_error(swarm: LocalSwarm) -> None:
    result = doctor("other/model", "--join", swarm.link)
    assert isinstance(result.exception, BadRequest) and "other/model" in str(result.exception)
    assert isinstance(doctor("--join", swarm.link, "--port", "70000").exception, BadRequest)
