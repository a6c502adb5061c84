"""Speeds that are measured on the blocks themselves, and remembered."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from swarm import EMBEDDED_MODEL
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.span import Span, load_span
from swarm.ranges import BlockRange
from swarm.server import speed as speed_module
from swarm.server.cores import Cores
from swarm.server.execution import Executor, PackedExecutor, SessionExecutor
from swarm.server.speed import REMEMBERED_S, Speed, SpeedFile, describe, measure_speed


@pytest.fixture(scope="module")
def span() -> Span:
    checkpoint = Checkpoint.open(CheckpointSource(EMBEDDED_MODEL))
    return load_span(checkpoint, BlockRange(0, 2), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("is_packed", [True, False])
def test_speed_is_measured_for_one_token_for_many_at_once_and_for_a_prompt(span, is_packed, monkeypatch):
    monkeypatch.setattr(speed_module, "MEASURE_S", 0.0)
    executor: Executor = PackedExecutor(KVStore(kv_layout(span), 2048)) if is_packed else SessionExecutor()
    with closing(Cores(None)) as cores:
        speed = measure_speed(executor, span, cores)
    assert set(speed.seconds) == {1, 4, 16, 256}
    costs = speed.costs()
    assert 0 < costs.iteration_s(1) <= costs.iteration_s(16) <= costs.iteration_s(256)


def test_what_the_cache_has_no_room_for_is_not_measured(span, monkeypatch):
    monkeypatch.setattr(speed_module, "MEASURE_S", 0.0)
    with closing(Cores(None)) as cores:
        speed = measure_speed(PackedExecutor(KVStore(kv_layout(span), 300)), span, cores)
    assert set(speed.seconds) == {1, 4}


def test_speeds_are_remembered_for_a_while_by_all_that_they_depend_on(span, tmp_path: Path):
    file, now_s = SpeedFile(tmp_path / "new" / "speeds.json"), time.time()
    what, other = (describe(span, "model", "float32", num_threads) for num_threads in (1, 2))
    assert what != other and file.find(what) is None
    speed = Speed(seconds={1: 0.01, 256: 0.5}, measured_at_s=now_s)
    file.note(what, speed)
    file.note(other, Speed(seconds={1: 0.1}, measured_at_s=now_s - REMEMBERED_S - 1))
    assert SpeedFile(file.path).find(what) == speed
    assert file.find(other) is None
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["speeds.json"]


@pytest.mark.parametrize("content", ["", "{", '{"speeds": {"a": {"seconds": {"1": -1}}}}', '{"speeds": 5}', "\0\0"])
def test_a_damaged_file_is_as_none(content, tmp_path: Path):
    path = tmp_path / "speeds.json"
    path.write_text(content)
    assert SpeedFile(path).find("a") is None
    SpeedFile(path).note("a", Speed(seconds={1: 1.0}, measured_at_s=time.time()))
    assert SpeedFile(path).find("a") is not None


def test_the_file_does_not_grow_without_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(speed_module, "MAX_REMEMBERED", 3)
    file = SpeedFile(tmp_path / "speeds.json")
    for number in range(6):
        file.note(str(number), Speed(seconds={1: 1.0}, measured_at_s=time.time()))
    assert [file.find(str(number)) is not None for number in range(6)] == [False] * 3 + [True] * 3


def test_without_a_file_nothing_is_remembered():
    SpeedFile(None).note("a", Speed(seconds={1: 1.0}))
    assert SpeedFile(None).find("a") is None
