"""How soon is a server that lost its network for some minutes found again? In network namespaces; needs root.

A bootstrap node, two servers of all blocks and a client that would use one of them only are hosts of their own. That
server's cable is pulled: nothing arrives any more on either side, and nobody is told. Its announcement ends meanwhile.
The client asks for a route all the time and says from when on there is one again; the claim is one announce period.

    python benchmarks/healing.py --cut-s 120
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common import print_plain, rounded, say

from swarm import EMBEDDED_MODEL
from swarm.identity import Identity

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "network"))
from lab import Lab, read_file, why_not

START_TIMEOUT_S = 120.0

WATCH = """
import sys, time
from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.errors import NoRoute
from swarm.link import JoinLink
path, link, peer_id = sys.argv[1:]
peers = JoinLink.parse(link).initial_peers
often = {"refresh_period_s": 0.1, "directory_bytes_per_min": 5_000_000}
config = ClientConfig(initial_peers=peers, allowed_servers=[peer_id], **often)
model = AutoDistributedModelForCausalLM.from_pretrained(path, client_config=config)
before = None
while True:
    try:
        found = len(model.explain_route()) > 0
    except NoRoute:
        found = False
    if found != before:
        print(time.monotonic(), "found" if found else "lost", flush=True)
    before = found
    time.sleep(0.1)
"""


def wait_for(path: Path, what: str, timeout_s: float) -> str:
    """Wait until a file has so much to say; return its last line with that word."""
    deadline_s = time.monotonic() + timeout_s
    while not (lines := [line for line in read_file(path).splitlines() if what in line]):
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{path.name} does not say {what!r} within {timeout_s:.0f} s:\n{read_file(path)[-2000:]}")
        time.sleep(0.05)
    return lines[-1]


def measure(directory: Path, cut_s: float, period_s: float) -> dict[str, float]:
    """How long after the cut the server is lost, and how long after healing it is found again."""
    with Lab() as lab:

        def start(host: int, name: str, *arguments: str) -> str:
            """Start a node on a host of its own; return its join link."""
            namespace = lab.add_public(host)
            files = ("--link-file", str(directory / name), "--identity", str(directory / f"{name}.key"))
            command = [sys.executable, "-m", "swarm.cli.app", *arguments, "--host", "0.0.0.0", *files]
            lab.start(namespace, command, (directory / f"{name}.log").open("w"))
            return wait_for(directory / name, "swarm://", START_TIMEOUT_S)

        serve = ("serve", EMBEDDED_MODEL, "--cache-mib", "64", "--threads", "1", "--announce-period", str(period_s))
        link = start(1, "bootstrap", "dht", "--port", "31337")
        start(2, "other", *serve, "--join", link)
        start(3, "server", *serve, "--join", link)
        peer_id = Identity.load_or_create(directory / "server.key").peer_id
        said = directory / "watcher.log"
        command = [sys.executable, "-c", WATCH, EMBEDDED_MODEL, link, peer_id]
        lab.start(lab.add_public(4), command, said.open("a"))
        wait_for(said, "found", START_TIMEOUT_S)
        lab.cut(3)
        began_s = time.monotonic()
        say(f"cut for {cut_s:.0f} s")
        time.sleep(cut_s)
        lost_s = float(wait_for(said, "lost", 1.0).split()[0]) - began_s
        said.write_text("")
        lab.heal(3)
        healed_s = time.monotonic()
        found_s = float(wait_for(said, "found", 300.0).split()[0]) - healed_s
    return {"lost_after_s": lost_s, "found_after_s": found_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut-s", type=float, default=120.0)
    parser.add_argument("--announce-period", type=float, default=15.0)
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"did not run: {reason}")
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), arguments.cut_s, arguments.announce_period)
    print_plain(
        "healing",
        cut_s=arguments.cut_s,
        announce_period_s=arguments.announce_period,
        **{name: rounded(seconds) for name, seconds in found.items()},
    )


if __name__ == "__main__":
    main()
