"""Machines are restarted while people generate, and a server comes back after it was cut off: nobody notices."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from swarms_help import wait_until
from tiny import NUM_BLOCKS, load_local, random_ids

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.errors import NoRoute
from swarm.identity import Identity
from swarm.link import JoinLink
from swarm.ranges import BlockRange
from swarm.server.local import ProcessServer, free_port

PERIODS_ALIVE = 4
NUM_TOKENS = 48
FLAGS = ("--cache-mib", "64", "--threads", "1", "--dtype", "float32")
HALVES = (BlockRange(0, NUM_BLOCKS // 2), BlockRange(NUM_BLOCKS // 2, NUM_BLOCKS))


class Machines:
    """A bootstrap node and servers with key files and ports of their own, as people start them."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._ports: dict[str, int] = {}
        self._bootstrap: subprocess.Popen[bytes] | None = None
        self.servers: dict[str, ProcessServer] = {}
        self.link = ""

    def start_bootstrap(self) -> None:
        link_file = self._folder / "link"
        link_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "swarm.cli.app", "dht", *self._kept("bootstrap", "--port")]
        self._bootstrap = subprocess.Popen([*command, "--link-file", str(link_file)], stdout=subprocess.DEVNULL)
        wait_until(link_file.exists, "the bootstrap node runs", 60)
        self.link = link_file.read_text().strip()

    def kill_bootstrap(self) -> None:
        assert self._bootstrap is not None
        self._bootstrap.kill()
        self._bootstrap.wait()

    def start(self, name: str, blocks: BlockRange, *, announce_period_s: float = 1.0) -> None:
        kept = [*self._kept(name, "--dht-port"), "--port", str(self._port(f"{name} gRPC"))]
        period = ["--announce-period", str(announce_period_s)]
        self.servers[name] = ProcessServer(str(self._model), blocks, self.link, [*FLAGS, *period, *kept])
        self.servers[name].wait_ready()

    def peer_id(self, name: str) -> str:
        return Identity.load_or_create(self._folder / f"{name}.key").peer_id

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        if self._bootstrap is not None:
            self.kill_bootstrap()

    def _kept(self, name: str, port_flag: str) -> list[str]:
        """What stays when it is started again."""
        return ["--identity", str(self._folder / f"{name}.key"), port_flag, str(self._port(name))]

    def _port(self, name: str) -> int:
        return self._ports.setdefault(name, free_port())


@pytest.fixture
def machines(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tiny_model("llama"), tmp_path)
    try:
        machines.start_bootstrap()
        yield machines
    finally:
        machines.close()


def test_bootstrap_node_and_half_of_the_servers_restart_while_four_clients_generate(
    machines: Machines, tiny_model: Callable[..., Path]
) -> None:
    path = tiny_model("llama")
    with ThreadPoolExecutor(4) as pool:
        names = [(f"server{copy}{half}", blocks) for copy in range(2) for half, blocks in enumerate(HALVES)]
        list(pool.map(lambda each: machines.start(*each), names))
    local = load_local(path)
    prompts = [random_ids(1, 8 + number) for number in range(4)]
    options = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
    wanted = [local.generate(prompt, **options) for prompt in prompts]
    peers = JoinLink.parse(machines.link).initial_peers
    config = ClientConfig(initial_peers=peers, silence_s=1.0, refresh_period_s=0.5)
    with ExitStack() as owned, ThreadPoolExecutor(4) as people:
        models = []
        for _ in prompts:
            models.append(AutoDistributedModelForCausalLM.from_pretrained(str(path), client_config=config).eval())
            owned.callback(models[-1].close)
        restarted: list[str] = []

        def keep_generating(number: int) -> int:
            """At least once in full after everything is back."""
            rounds = 0
            while True:
                last = len(restarted) == 3
                assert torch.equal(models[number].generate(prompts[number], **options), wanted[number])
                rounds += 1
                if last:
                    return rounds

        generating = [people.submit(keep_generating, number) for number in range(4)]
        try:
            machines.kill_bootstrap()
            for name, _ in names[:2]:
                machines.servers[name].kill()
            machines.start_bootstrap()
            restarted.append("bootstrap")
            for name, blocks in names[:2]:
                machines.start(name, blocks)
                restarted.append(name)
        finally:
            restarted += ["it failed"] * (3 - len(restarted))
        assert all(each.result(120) >= 2 for each in generating)
        routed = {hop.peer_id for hop in models[0].explain_route()}
        assert routed <= {machines.peer_id(name) for name, _ in names}


def test_a_server_that_was_cut_off_is_on_routes_again_one_announce_period_after_healing(
    machines: Machines, tiny_model: Callable[..., Path]
) -> None:
    period_s = 3.0
    machines.start("server", BlockRange(0, NUM_BLOCKS), announce_period_s=period_s)
    peer_id = machines.peer_id("server")
    config = ClientConfig(
        initial_peers=JoinLink.parse(machines.link).initial_peers,
        refresh_period_s=0.1,
        directory_bytes_per_min=2_000_000,
    )
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        str(tiny_model("llama")), client_config=config, allowed_servers=[peer_id]
    )

    def is_on_route() -> bool:
        try:
            return [hop.peer_id for hop in model.explain_route()] == [peer_id]
        except NoRoute:
            return False

    try:
        assert is_on_route()
        machines.servers["server"].pause()
        wait_until(lambda: not is_on_route(), "its announcement has ended", 3 * PERIODS_ALIVE * period_s)
        machines.servers["server"].resume()
        healed_s = time.monotonic()
        wait_until(is_on_route, "it is on routes again")
        assert time.monotonic() - healed_s < period_s
    finally:
        model.close()
