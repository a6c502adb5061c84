"""On which cores a server computes, and when: each of its threads on one of its own; servers that share them in turns.

Two processes that compute at once, each with a thread for every core, wait for each other's threads at the end of
every operation: both together do far less than one after the other. While a server waits for its turn, the steps of
its other sessions arrive, and its next pass carries more of them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
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

TASKS, SYSTEM_CPUS = Path("/proc/self/task"), Path("/sys/devices/system/cpu")
"""Where Linux tells of this process's threads, and of the cores."""

MAX_NAME_CHARS = 15
"""Of a thread, as Linux keeps it."""

PARALLEL_ELEMENTS = 1 << 20
"""An operation on so many elements is worth all of torch's threads."""


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


def keep_apart() -> None:
    """Bind each of the threads that torch computes with to a core of its own, if they take all that we may use.

    Left alone, two of them that wake up after a pause are often on one core while another one idles. Operations end
    with barriers, so each then takes milliseconds, until the system moves a thread. Called by the thread that computes;
    where a system offers no way to bind threads, nothing happens.
    """
    name = f"compute{threading.get_native_id()}"[:MAX_NAME_CHARS]
    try:
        (TASKS / str(threading.get_native_id()) / "comm").write_text(name)
        torch.zeros(PARALLEL_ELEMENTS).add_(1)  # now torch has its threads, which have our name
        threads = [int(each.name) for each in TASKS.iterdir() if (each / "comm").read_text().strip() == name]
        cores = cores_by_number()
        if len(threads) != len(cores):
            logger.debug("%d threads on %d cores go where they like", len(threads), len(cores))
            return
        for thread, core in zip(sorted(threads), cores, strict=True):
            os.sched_setaffinity(thread, core)
    except (OSError, AttributeError) as exc:  # not Linux, or not allowed
        logger.debug("threads go where they like: %s", exc)


def cores_by_number() -> list[set[int]]:
    """The cores that we may use, each as the numbers under which the system knows it."""
    allowed = os.sched_getaffinity(0)
    siblings = [SYSTEM_CPUS / f"cpu{number}" / "topology" / "thread_siblings_list" for number in allowed]
    by_core: dict[str, set[int]] = {path.read_text(): set() for path in siblings}
    for number, path in zip(allowed, siblings, strict=True):
        by_core[path.read_text()].add(number)
    return list(by_core.values())


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        logger.info("servers on this machine cannot take turns: %s", exc)
        return None
