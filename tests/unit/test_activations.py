"""Room for the activations of training: graphs never take more, and nobody's are dropped for what cannot be kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny
from torch import Tensor

from swarm.errors import PromptTooLong
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.span import Span, load_span
from swarm.ranges import BlockRange
from swarm.server import activations
from swarm.server.activations import MAX_KEPT_S, PROTECTED_S, KeptActivations, cut
from swarm.server.autograd_graphs import Graph, build
from swarm.server.batches import Batch, Gradients, run_backward, run_forward
from swarm.v1 import blocks_pb2 as pb

BLOCKS, HIDDEN, LENGTH = BlockRange(0, 6), 64, 9
MUCH = 1 << 30


@dataclass
class Alone:
    """Turns of a computation that nobody interrupts; notes the largest that a budget was at any boundary."""

    kept: KeptActivations
    num_rows: int = 64
    used_bytes: list[int] = field(default_factory=list)

    def at_boundary(self) -> None:
        self.used_bytes.append(self.kept.used_bytes)

    def rows(self, num_rows: int, length: int) -> int:
        return min(num_rows, self.num_rows)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    path: Path = save_tiny(tmp_path_factory.mktemp("llama"), "llama")
    return load_span(Checkpoint.open(CheckpointSource(str(path))), BLOCKS, dtype=torch.float32, device="cpu")


def make_batch(num_rows: int, *, name: int = 1, prompts: bool = False, length: int = LENGTH) -> Batch:
    draw = torch.Generator().manual_seed(name)
    x_BLD = torch.randn(num_rows, length, HIDDEN, generator=draw)
    prompts_NBPD = torch.randn(len(BLOCKS), 1, 2, HIDDEN, generator=draw) if prompts else None
    return Batch(BLOCKS, x_BLD, None, None, prompts_NBPD, None, pb.CODEC_RAW, bytes([name] * 16))


def row_bytes(span: Span) -> int:
    """What the graph of one row takes, all blocks together."""
    kept = KeptActivations(MUCH, MUCH)
    return build(span, make_batch(1).rows(0, 1), 0, Alone(kept), room_bytes=MUCH).num_bytes


def gradients(span: Span, batch: Batch, kept: KeptActivations, turns: Alone | None = None) -> Gradients:
    return run_backward(span, batch, torch.ones_like(batch.x_BLD), turns or Alone(kept), kept)


def oracle(span: Span, batch: Batch) -> list[Tensor]:
    """The plain way: one graph of everything."""
    inputs = [each.clone().requires_grad_() for each in (batch.x_BLD, batch.prompts_NBPD) if each is not None]
    y_BLD = span(inputs[0], prompts_NBPD=inputs[1] if len(inputs) > 1 else None)
    return list(torch.autograd.grad(y_BLD.sum(), inputs))


def assert_right(span: Span, batch: Batch, found: Gradients) -> None:
    wanted = oracle(span, batch)
    torch.testing.assert_close(found.dx_BLD, wanted[0], atol=1e-4, rtol=1e-4)
    if batch.prompts_NBPD is not None:
        assert found.dprompts_NBPD is not None
        torch.testing.assert_close(found.dprompts_NBPD, wanted[1], atol=1e-3, rtol=1e-4)


def test_an_oversized_batch_keeps_the_rows_that_fit_and_others_keep_theirs(span: Span) -> None:
    kept = KeptActivations(int(5.5 * row_bytes(span)), MUCH)
    other, large = make_batch(2, name=1), make_batch(8, name=2)
    for batch in (other, large):
        run_forward(span, batch, Alone(kept), kept)
    assert kept.used_bytes <= kept.max_bytes
    assert_right(span, large, gradients(span, large, kept))
    assert kept.num_hits == 1  # three rows at once
    assert_right(span, other, gradients(span, other, kept))
    assert kept.num_hits == 3 and kept.used_bytes == 0  # and the row that showed the size, and another one


def test_what_fits_takes_the_place_of_older_ones_but_not_of_young_ones(
    span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, now_s = KeptActivations(int(5.5 * row_bytes(span)), MUCH), 0.0
    monkeypatch.setattr("swarm.server.batches.time.monotonic", lambda: now_s)
    for name, after_s, num_kept in ((1, 0.0, 4), (2, PROTECTED_S / 2, 5), (3, PROTECTED_S * 2, 5)):
        now_s = after_s
        run_forward(span, make_batch(4, name=name), Alone(kept), kept)
        assert sum(graph.num_rows for each in kept._kept.values() for graph in each.graphs) == num_kept
    assert [sum(graph.num_rows for graph in kept.take(bytes([name] * 16))) for name in (1, 2, 3)] == [0, 1, 4]


def test_without_room_no_graph_is_built_in_forward(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, batch = KeptActivations(0, MUCH), make_batch(3)
    with monkeypatch.context() as patch:
        patch.setattr("swarm.server.batches.build", lambda *_args, **_how: pytest.fail("a graph was built"))
        run_forward(span, batch, Alone(kept), kept)
    assert_right(span, batch, gradients(span, batch, kept))
    assert kept.num_hits == 0


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 1.3, 2.7])
def test_kept_activations_stay_within_the_budget_while_they_are_built(span: Span, share: float) -> None:
    kept, batch = KeptActivations(int(share * row_bytes(span)), MUCH), make_batch(4)
    turns, sizes = Alone(kept, num_rows=2), watched(kept)
    run_forward(span, batch, turns, kept)
    assert max([*turns.used_bytes, kept.used_bytes]) <= kept.max_bytes
    assert all(used + built <= kept.max_bytes for used, built in sizes)
    assert_right(span, batch, gradients(span, batch, kept))


def watched(kept: KeptActivations) -> list[tuple[int, int]]:
    """Note what each graph takes, beside what was kept before."""
    noted: list[tuple[int, int]] = []
    keep = kept.keep

    def noting(forward_id: bytes, graph: Graph, now_s: float) -> None:
        noted.append((kept.used_bytes, graph.num_bytes))
        keep(forward_id, graph, now_s)

    kept.keep = noting  # type: ignore[method-assign]
    return noted


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.7, 1.1, 2.5])
def test_backward_stays_within_its_room_however_little_that_is(
    span: Span, monkeypatch: pytest.MonkeyPatch, share: float, prompts: bool
) -> None:
    kept, batch, built = KeptActivations(0, int(share * row_bytes(span))), make_batch(3, prompts=prompts), []

    def noting(*args: object, **how: int) -> Graph:
        graph = build(*args, **how)  # type: ignore[arg-type]
        built.append(graph.num_bytes)
        return graph

    monkeypatch.setattr("swarm.server.batches.build", noting)
    assert_right(span, batch, gradients(span, batch, kept))
    assert max(built) <= kept.graph_bytes
    assert len(built) >= (2 if share < 3 else 1)


def test_a_sequence_that_does_not_fit_in_one_block_is_refused(span: Span) -> None:
    kept = KeptActivations(0, int(0.05 * row_bytes(span)))
    batch = make_batch(2)
    with pytest.raises(PromptTooLong, match="use shorter sequences"):
        gradients(span, batch, kept)
    kept.graph_bytes = MUCH
    assert_right(span, batch, gradients(span, batch, kept))


def test_too_old_activations_go_without_traffic(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptActivations(MUCH, MUCH)
    monkeypatch.setattr("swarm.server.batches.time.monotonic", lambda: 100.0)
    run_forward(span, make_batch(2), Alone(kept), kept)
    kept.expire(100 + MAX_KEPT_S)
    assert kept.used_bytes > 0
    kept.expire(101 + MAX_KEPT_S)
    assert kept.used_bytes == 0 and kept.take(bytes([1] * 16)) == []


def test_an_abandoned_forward_keeps_nothing(span: Span) -> None:
    class Gone(Exception):
        pass

    class Leaving(Alone):
        def rows(self, num_rows: int, length: int) -> int:
            if self.kept.used_bytes:
                raise Gone
            return 1

    kept = KeptActivations(MUCH, MUCH)
    with pytest.raises(Gone):
        run_forward(span, make_batch(2), Leaving(kept), kept)
    assert kept.used_bytes == 0


@given(st.integers(1, 64), st.integers(1, 80), st.floats(1, 1e6), st.integers(0, 1 << 20), st.integers(0, 1 << 26))
def test_a_cut_fits_wherever_something_fits(
    num_rows: int, num_blocks: int, row_bytes: float, state_bytes: int, room_bytes: int
) -> None:
    chosen = cut(num_rows, num_blocks, row_bytes, state_bytes, room_bytes)
    assert 1 <= chosen.num_rows <= num_rows and 1 <= chosen.num_blocks <= num_blocks
    if chosen.num_blocks < num_blocks:
        assert chosen.num_rows == 1
    if (chosen.num_rows, chosen.num_blocks) != (1, 1):
        assert chosen.num_rows * chosen.num_blocks * row_bytes <= room_bytes * (1 + 1e-9)


def test_few_kinds_of_graphs_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MAX_KINDS", 3)
    sizes = activations.GraphSizes()
    for number in range(5):
        sizes.exceeded(number, activations.Cut(1, 1), 100)
    assert [sizes.row_bytes(number) for number in range(5)] == [None, None, 200, 200, 200]
