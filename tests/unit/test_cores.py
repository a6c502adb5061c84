"""Turns on a machine's cores: one at a time, not for ever, and only where they are scarce."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from swarm.server import cores
from swarm.server.compute import ComputeThread
from swarm.server.cores import Cores, cores_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "turn"


def test_one_computes_at_a_time(path):
    first, second = Cores(path), Cores(path)
    assert first.take_nowait() and not second.take_nowait()
    assert first.take_nowait()  # it still has it
    first.give_back()
    assert second.take_nowait() and not first.take_nowait()
    second.close()
    assert first.take_nowait()
    first.close()


def test_long_work_lets_others_go_first(path):
    first, second = Cores(path), Cores(path)
    assert first.take_nowait()
    first.pause()
    assert not second.take_nowait()
    first.give_back()
    first.close()
    second.close()


def test_who_keeps_the_cores_for_too_long_is_not_waited_for(path, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(cores.time, "monotonic", lambda: now_s)
    holder, other = Cores(path), Cores(path)
    assert holder.take_nowait() and not other.take_nowait()
    now_s += cores.PATIENCE_S
    assert other.take_nowait() and other.take_nowait()
    other.give_back()  # of what it never had
    now_s += cores.SULK_S
    assert not other.take_nowait()
    holder.close()
    assert other.take_nowait()
    other.close()


def test_only_scarce_cpu_cores_are_shared_by_turns(monkeypatch):
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 8)
    assert cores_path(torch.device("cpu"), 8) is not None
    assert cores_path(torch.device("cpu"), 4) is None
    assert cores_path(torch.device("cuda", 0), 8) is None


def test_without_a_file_nobody_waits(tmp_path):
    for each in (Cores(None), Cores(tmp_path / "not there" / "turn")):
        assert each.take_nowait()
        each.pause()
        each.give_back()
        each.close()


def threads_of(thread: ComputeThread) -> list[set[int]]:
    """On which cores each of the threads may run that a compute thread computes with."""
    name = f"compute{thread.submit(threading.get_native_id).result()}"
    torch_threads = [each.name for each in cores.TASKS.iterdir() if (each / "comm").read_text().strip() == name]
    return [os.sched_getaffinity(int(each)) for each in torch_threads]


@pytest.mark.skipif(not cores.TASKS.exists(), reason="only Linux says which threads there are")
def test_threads_that_take_all_cores_have_one_each_and_the_others_go_where_they_like():
    before = os.sched_getaffinity(0)
    mine = cores.cores_by_number()
    with ComputeThread(num_threads=len(mine), uses_cores=True) as thread:
        assert sorted(map(sorted, threads_of(thread))) == sorted(map(sorted, mine))
    with ComputeThread(num_threads=len(mine) + 1, uses_cores=True) as thread:
        assert all(each == before for each in threads_of(thread))
    assert os.sched_getaffinity(0) == before


def test_numbers_of_one_core_stay_together(tmp_path, monkeypatch):
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(cores, "SYSTEM_CPUS", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert cores.cores_by_number() == [{0, 2}, {1, 3}]
