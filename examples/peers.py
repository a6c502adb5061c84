"""What examples share that train with several peers: hivemind's optimizer, steps, and peers on this computer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.optim.grad_averager import GradientAverager
from tuning import console


def new_optimizer(
    dht: hivemind.DHT, run_id: str, parameters: Sequence[torch.nn.Parameter], *, samples_per_update: int,
    learning_rate: float, num_updates: int,
) -> hivemind.Optimizer:  # fmt: skip
    """AdamW over all peers of a run, with a learning rate that falls to nothing at its end and the patience that suits
    peers near to one another.

    A peer that takes no step within matchmaking_time is not in the group that averages: its gradients are lost, and it
    loads what the others have become. So let that time be several steps of the slowest peer. Between peers that are far
    away, hivemind's own defaults (15 s, and 60 s of averaging_timeout) fit better, with updates large enough that these
    do not matter.
    """
    quick: dict[str, Any] = {"request_timeout": 0.5}

    def new_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: max(0.0, 1 - update / num_updates))

    return hivemind.Optimizer(
        dht=dht,
        run_id=run_id,
        params=parameters,
        optimizer=lambda given: torch.optim.AdamW(given, lr=learning_rate),
        scheduler=new_schedule,
        target_batch_size=samples_per_update,
        matchmaking_time=3.0,
        averaging_timeout=15.0,
        next_chunk_timeout=3.0,
        average_state_every=5,
        averager_opts=quick,
        grad_averager_factory=partial(GradientAverager, **quick),
        tracker_opts={"min_refresh_period": 0.2, "max_refresh_period": 1.0, "default_refresh_period": 0.5},
    )


def follow(
    model: Any, optimizer: hivemind.Optimizer, next_batch: Callable[[], Mapping[str, torch.Tensor]], num_updates: int
) -> int:
    """Take steps until the run has made so many updates, and say each; return from how many samples we have learned."""
    model.train()
    update, losses, num_samples = optimizer.local_epoch, [], 0
    while update < num_updates:
        batch = next_batch()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        size = len(batch["input_ids"])
        optimizer.step(batch_size=size)
        optimizer.zero_grad()
        losses.append(loss.item())
        num_samples += size
        if optimizer.local_epoch != update:
            update = optimizer.local_epoch
            num_peers = max(1, optimizer.tracker.global_progress.num_peers)
            say({"update": update, "loss": sum(losses) / len(losses), "num_peers": num_peers})
            losses = []
    return num_samples


def end_on_sigterm() -> None:
    """Leave every `with` on the way, so that no peer is left behind.

    hivemind shows each failure to reach a peer that is gone with a traceback, a thousand in a minute, and goes on; that
    and how its threads end is left out.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def say(words: Mapping[str, Any]) -> None:
    """A line for whoever started this peer."""
    print(json.dumps(words), flush=True)


class Peer:
    """A peer in a process group of its own; killed, it is gone like a machine that was switched off."""

    def __init__(self, name: str, script: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.said: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        # hivemind forks; gRPC has nothing to do in its processes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        command = [sys.executable, str(Path(script).resolve()), *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def losses(self) -> dict[int, float]:
        """By update, as far as it took part."""
        return {each["update"]: each["loss"] for each in self.said if "update" in each}

    @property
    def outcome(self) -> dict[str, Any]:
        """What it has said last; empty if it was killed before it spoke."""
        return self.said[-1] if self.said else {}

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until it says something; return that. Raises: SystemExit: it ended before."""

        def found() -> dict[str, Any] | None:
            return next((each for each in self.said if condition(each)), None)

        with self._changed:
            self._changed.wait_for(lambda: self._ended or found() is not None)
            said = found()
        if said is None:
            raise SystemExit(f"{self.name} ended too early")
        return said

    def wait_update(self, number: int) -> None:
        """Wait until it has made that update. Raises: SystemExit: it ended before."""
        self.wait_for(lambda words: words.get("update", 0) >= number)

    def wait_done(self) -> None:
        """Wait for its end. Raises: SystemExit: it failed."""
        self._thread.join()
        if self._process.wait() or "after" not in self.outcome:
            raise SystemExit(f"{self.name} failed")

    def kill(self) -> None:
        """End it and what it has started, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and line.endswith("\n"):  # a peer that is killed leaves half a line
                self._hear(json.loads(line))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hear(self, words: dict[str, Any]) -> None:
        with self._changed:
            self.said.append(words)
            self._changed.notify_all()
        if "update" in words:
            console.print(
                f"{self.name}: update {words['update']}, loss {words['loss']:.3f}, peers: {words['num_peers']}"
            )
