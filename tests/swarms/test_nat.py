"""A server and a client behind address translation: the relay carries what they send, and `swarm doctor` says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "network"))
import lab

START_TIMEOUT_S = 60.0
PORT = 31330

GENERATE = """
import sys, torch
from tiny import load_local, random_ids
from swarm import AutoDistributedModelForCausalLM
path, link = sys.argv[1:]
remote, local = AutoDistributedModelForCausalLM.from_pretrained(path, join=link), load_local(path)
ids = random_ids(1, 600)  # more than one message each way, and more than libp2p's own relays carry
with torch.no_grad():
    assert (remote(ids).logits - local(ids).logits).abs().max() <= 1e-5
options = {"max_new_tokens": 12, "do_sample": False}
assert torch.equal(remote.generate(ids[:, :9], **options), local.generate(ids[:, :9], **options))
assert [hop.server.direct for hop in remote.explain_route()] == [[]]
remote.close()
print("equal")
"""


@dataclass
class Internet:
    """A bootstrap node on the internet, a server of all blocks in home 1, nobody yet in home 2."""

    lab: lab.Lab
    link: str
    path: str
    homes: list[str]
    server_log: Path

    def run(self, home: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.lab.run(self.homes[home - 1], [sys.executable, *arguments], START_TIMEOUT_S)

    def doctor(self, home: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(home, "-m", "swarm.cli.app", "doctor", "--join", self.link, *arguments)


@pytest.fixture(scope="module")
def internet(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    if reason := lab.why_not():
        pytest.skip(f"did not run: {reason}")
    path, directory = str(tiny_model("llama")), tmp_path_factory.mktemp("nat")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    try:
        with lab.Lab() as made, (directory / "server.log").open("w") as log:
            public, homes = made.add_public(1), [made.add_home(1), made.add_home(2)]

            def start(namespace: str, name: str, *arguments: str) -> str:
                """Start a command that writes a join link when it is ready."""
                file = directory / name
                command = [sys.executable, "-m", "swarm.cli.app", *arguments, "--host", "0.0.0.0"]
                process = made.start(namespace, [*command, "--link-file", str(file)], log)
                deadline_s = time.monotonic() + START_TIMEOUT_S
                while not file.exists():
                    assert process.poll() is None and time.monotonic() < deadline_s, (
                        directory / "server.log"
                    ).read_text()
                    time.sleep(0.02)
                return file.read_text().strip()

            link = start(public, "dht", "dht", "--port", "31337")
            start(homes[0], "server", "serve", path, "--dtype", "float32", "--cache-mib", "64", "--join", link)
            yield Internet(made, link, path, homes, directory / "server.log")
    finally:
        del os.environ["PYTHONPATH"]


def test_generation_through_the_relay_equals_the_local_model(internet: Internet) -> None:
    done = internet.run(2, "-c", GENERATE, internet.path, internet.link)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_the_server_says_once_what_to_open(internet: Internet) -> None:
    said = [line for line in internet.server_log.read_text().splitlines() if "not reachable from outside" in line]
    assert len(said) == 1 and "7.7.7.101" in said[0] and "clients come through a relay" in said[0]


def test_the_doctor_says_which_way_the_server_is_reached_and_what_to_open(internet: Internet) -> None:
    done = internet.doctor(2, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    [peer], [model] = report["peers"], report["models"]
    [server] = model["servers"]
    assert (server["way"], server["relay_id"], server["error"]) == ("relay", peer["peer_id"], "")
    assert peer["relays"] and not peer["error"] and peer["rtt_s"] < 1
    assert 0 < server["rtt_s"] < 1 and server["upload_bytes_per_s"] > 1e6 and server["download_bytes_per_s"] > 1e6
    assert model["missing_blocks"] == [] and report["is_complete"]
    own = report["own"]
    assert own["seen_as"] == ["7.7.7.102"] and own["is_translated"] and own["reach"]["missed"] == ["7.7.7.102"]
    advice = "\n".join(report["advice"])
    assert "Others cannot dial this machine (7.7.7.102" in advice and "forward" in advice
    assert f"is reached through relay {peer['peer_id'][-8:]}" in advice
    assert "All 6 blocks of" in advice


def test_the_doctor_sees_a_port_that_was_forwarded(internet: Internet) -> None:
    internet.lab.forward_port(2, PORT)
    done = internet.doctor(2, "--port", str(PORT))
    assert done.returncode == 0, done.stderr
    assert f"Others can dial this machine (7.7.7.102, TCP port {PORT})" in done.stdout
