"""Servers that share a machine's cores take turns on them.

Two processes that compute at once, each with a thread for every core, wait for each other's threads at the end of
every operation: both together do far less than one after the other. While a server waits for its turn, the steps of
its other sessions arrive, and its next pass carries more of them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long a turn is waited for. Whoever has it then is in a long pass, or was stopped: we compute beside it."""

SULK_S = 5.0
"""How long no turn is waited for after that."""

POLL_S = 0.0003
"""How often to ask whether the cores are free."""


def cores_path(device: torch.device, num_threads: int) -> Path | None:
    """The file whose lock is the turn; None where servers need not take turns: on GPUs, and where there are cores
    enough for another server of as many threads."""
    num_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if device.type != "cpu" or 2 * num_threads <= num_cores:
        return None
    return Path(tempfile.gettempdir(), f"swarm-cores-{os.getuid()}.lock")


class Cores:
    """One server's turns. Used by its compute thread alone; closed by whoever made it."""

    def __init__(self, path: Path | None) -> None:
        self._descriptor = None if path is None else _open(path)
        self._held = self._descriptor is None
        self._asked_since_s: float | None = None
        self._sulking_until_s = 0.0

    def take_nowait(self) -> bool:
        """Whether we may compute now: it is our turn, or we have waited long enough for it."""
        if self._held or self._descriptor is None:
            return True
        now_s = time.monotonic()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if now_s < self._sulking_until_s:
                return True
            self._asked_since_s = self._asked_since_s or now_s
            if now_s - self._asked_since_s < PATIENCE_S:
                return False
            logger.debug("another server keeps the cores: computing beside it")
            self._asked_since_s, self._sulking_until_s = None, now_s + SULK_S
            return True
        self._held, self._asked_since_s, self._sulking_until_s = True, None, 0.0
        return True

    def give_back(self) -> None:
        """Let others compute."""
        if self._held and self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._held = False

    def pause(self) -> None:
        """In the middle of long work: let those who wait compute first."""
        if self._held and self._descriptor is not None:
            self.give_back()
            time.sleep(0)
            while not self.take_nowait():
                time.sleep(POLL_S)

    def close(self) -> None:
        """Give the turn back for good."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        logger.info("servers on this machine cannot take turns: %s", exc)
        return None
