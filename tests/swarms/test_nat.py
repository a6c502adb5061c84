"""A server and a client behind address translation, and `swarm doctor` says so.

Where their routers allow it they dial each other, and the relay carries nothing more; otherwise it goes on carrying.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "network"))
import lab
from tiny import HIDDEN

START_TIMEOUT_S = 120.0
PORT = 31330
OPTIONS = ("--dtype", "float32", "--cache-mib", "64")

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
assert [hop.server.direct for hop in remote.explain_route()] == [[], []]
remote.close()
print("equal")
"""


PUNCHED = """
import logging, sys, time, torch
from pathlib import Path
from tiny import load_local, random_ids
from swarm import AutoDistributedModelForCausalLM
path, link, signals = sys.argv[1:]
said = []
logging.getLogger("swarm.tunnel").setLevel(logging.INFO)
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("swarm.tunnel").addHandler(handler)
def wait_until(is_true):
    until_s = time.monotonic() + 100
    while not is_true():
        assert time.monotonic() < until_s, said
        time.sleep(0.02)
def meet(name):  # with the test, which looks at the relay meanwhile
    Path(signals, name).touch()
    wait_until(Path(signals, name + ".seen").exists)
remote, local = AutoDistributedModelForCausalLM.from_pretrained(path, join=link), load_local(path)
ids = random_ids(1, 600)
with torch.no_grad():
    expected = local(ids).logits
    assert (remote(ids).logits - expected).abs().max() <= 1e-5  # at once, through the relay
    assert "through relay" in said[0]
    wait_until(lambda: sum("directly (punched)" in each for each in said) == 2)
    meet("punched")
    for _ in range(20):
        assert (remote(ids).logits - expected).abs().max() <= 1e-5
    meet("computed")
options = {"max_new_tokens": 6, "do_sample": False}
with remote.inference_session(max_length=64):
    text = remote.generate(ids[:, :9], **options)
    meet("begun")  # the relay dies
    text = torch.cat([text, remote.generate(None, **options)], dim=1)
assert torch.equal(text, local.generate(ids[:, :9], max_new_tokens=12, do_sample=False))
print("equal", flush=True)
remote.close()
"""


@dataclass
class Internet:
    """A bootstrap node on the internet, and two servers in home 1, each of half of the blocks.

    Nobody yet in homes 2 and 3; the router of home 3 gives each connection a random port.
    """

    lab: lab.Lab
    relay: subprocess.Popen[str]
    link: str
    path: str
    homes: list[str]
    server_logs: list[Path]

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
        with lab.Lab() as made, ExitStack() as owned:
            public, homes = (
                made.add_public(1),
                [made.add_home(1), made.add_home(2), made.add_home(3, is_symmetric=True)],
            )

            def start(namespace: str, name: str, *arguments: str) -> subprocess.Popen[str]:
                """Start a command that writes a join link when it is ready."""
                log = owned.enter_context((directory / f"{name}.log").open("w"))
                command = [sys.executable, "-m", "swarm.cli.app", "-v", *arguments, "--host", "0.0.0.0"]
                return made.start(namespace, [*command, "--link-file", str(directory / name)], log)

            def wait_ready(process: subprocess.Popen[str], name: str) -> str:
                deadline_s = time.monotonic() + START_TIMEOUT_S
                while not (directory / name).exists():
                    said = (directory / f"{name}.log").read_text()
                    assert process.poll() is None and time.monotonic() < deadline_s, said
                    time.sleep(0.02)
                return (directory / name).read_text().strip()

            relay = start(public, "dht", "dht", "--port", "31337")
            link = wait_ready(relay, "dht")
            servers = {
                name: start(homes[0], name, "serve", path, "--blocks", name, *OPTIONS, "--join", link)
                for name in ("0:3", "3:6")
            }
            for name, process in servers.items():
                wait_ready(process, name)
            yield Internet(made, relay, link, path, homes, [directory / f"{name}.log" for name in servers])
    finally:
        del os.environ["PYTHONPATH"]


def test_generation_through_the_relay_equals_the_local_model(internet: Internet) -> None:
    done = internet.run(3, "-c", GENERATE, internet.path, internet.link)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_servers_that_can_dial_each_other_at_home_say_once_what_to_open_for_others(internet: Internet) -> None:
    for log in internet.server_logs:
        said = [line for line in log.read_text().splitlines() if "not reachable from outside" in line]
        assert len(said) == 1 and "7.7.7.101" in said[0] and "clients come through a relay" in said[0]


def test_the_doctor_says_which_way_the_server_is_reached_and_what_to_open(internet: Internet) -> None:
    done = internet.doctor(3, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    [peer], [model] = report["peers"], report["models"]
    assert peer["relays"] and not peer["error"] and peer["rtt_s"] > 0
    for server in model["servers"]:
        assert (server["way"], server["relay_id"], server["error"]) == ("relay", peer["peer_id"], "")
        assert server["rtt_s"] > 0 and server["upload_bytes_per_s"] > 0 and server["download_bytes_per_s"] > 0
    assert model["missing_blocks"] == [] and report["is_complete"]
    own = report["own"]
    assert own["seen_as"] == ["7.7.7.103"] and own["is_translated"] and own["reach"]["missed"] == ["7.7.7.103"]
    advice = "\n".join(report["advice"])
    assert "Others cannot dial this machine (7.7.7.103" in advice and "forward" in advice
    assert advice.count(f"is reached through relay {peer['peer_id'][-8:]}") == 2
    assert "All 6 blocks of" in advice


def test_the_doctor_sees_a_port_that_was_forwarded(internet: Internet) -> None:
    internet.lab.forward_port(2, PORT)
    done = internet.doctor(2, "--port", str(PORT))
    assert done.returncode == 0, done.stderr
    assert f"Others can dial this machine (7.7.7.102, TCP port {PORT})" in done.stdout


def test_the_doctor_says_that_servers_are_reached_directly_where_both_ends_could_dial_each_other(
    internet: Internet,
) -> None:
    done = internet.doctor(2, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    [model] = report["models"]
    for server in model["servers"]:
        assert (server["way"], server["relay_id"], server["error"]) == ("punched", "", "")
        assert server["rtt_s"] > 0 and server["upload_bytes_per_s"] > 0 and server["download_bytes_per_s"] > 0
    assert report["is_complete"]


def test_calls_leave_the_relay_once_both_ends_have_dialled_each_other_and_outlive_it(
    internet: Internet, tmp_path: Path
) -> None:
    """The last test of this file: the relay dies."""
    with (tmp_path / "said").open("w+") as output:
        command = [sys.executable, "-c", PUNCHED, internet.path, internet.link, str(tmp_path)]
        process = internet.lab.start(internet.homes[1], command, output)

        def wait_for(name: str) -> int:
            """Wait until the client is there; return how many bytes the relay has received."""
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not (tmp_path / name).exists():
                assert process.poll() is None and time.monotonic() < deadline_s, (tmp_path / "said").read_text()
                time.sleep(0.02)
            return internet.lab.carried_bytes(1)

        def go_on(name: str) -> None:
            (tmp_path / f"{name}.seen").touch()

        before = wait_for("punched")
        go_on("punched")
        grown = wait_for("computed") - before
        deadline_s = time.monotonic() + START_TIMEOUT_S  # or it would push to the other one through the relay
        while "is in the same network" not in internet.server_logs[0].read_text():
            assert time.monotonic() < deadline_s, internet.server_logs[0].read_text()
            time.sleep(0.1)
        go_on("computed")
        wait_for("begun")
        internet.relay.kill()
        internet.relay.wait()
        go_on("begun")
        process.wait(START_TIMEOUT_S)
        assert (tmp_path / "said").read_text().strip().endswith("equal"), (tmp_path / "said").read_text()
    sent = 20 * 2 * 2 * 600 * HIDDEN * 4
    assert grown < sent / 20, f"the relay received {grown} bytes, of {sent} that were sent"
