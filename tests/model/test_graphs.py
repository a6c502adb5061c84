"""Replayed passes give what the modules give. A recorder that calls again stands for the device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packing import make_span, page_by_page
from tiny_configs import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swarm.model import families, graphs, ragged
from swarm.model.graphs import MAX_GRAPHS, MAX_ROWS, GraphedBlocks, graphed_blocks, replays_the_same
from swarm.model.kv_store import KVStore, kv_layout
from swarm.model.narrow import narrow
from swarm.model.paged import PAGE_TOKENS, Kernel, Pager
from swarm.model.pieces import Piece, position_ids
from swarm.model.ragged import PackedSpan
from swarm.model.span import Span
from swarm.ranges import BlockRange

NUM_PAGES = 8


class CallsAgain:
    """What `CudaRecorder` is on a device, without its memory of what to do: the same call on the same tensors."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        run()
        return run


class Refuses:
    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


def open_store(span: Span) -> KVStore:
    store = KVStore(kv_layout(span), NUM_PAGES * PAGE_TOKENS, scrap_slots=PAGE_TOKENS)
    for number in span.blocks:
        for heads in store.heads(number):
            heads.fill_(torch.nan)  # what is read without having been written shows
    return store


class Bench:
    """A packed span over a store, and its graphs."""

    def __init__(self, model_type: str, recorder: Any = None, kernel: Kernel = page_by_page, **settings: Any) -> None:
        config = tiny_config(model_type)
        for name, value in settings.items():
            setattr(config, name, value)
        self.span = make_span(config)
        self.store = open_store(self.span)
        self.packed = PackedSpan(self.span, self.store)
        self.pager = Pager(self.store, kernel)
        self.recorder = recorder or CallsAgain()
        self.graphed = GraphedBlocks(
            self.packed.rows.over(self.store, self.pager),
            self.store,
            self.pager,
            self.span.hidden_size,
            self.span.dtype,
            self.recorder,
        )

    def hidden(self, pieces: list[Piece]) -> Tensor:
        return torch.randn(sum(piece.length for piece in pieces), self.span.hidden_size)

    def both_ways(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        x_TD = self.hidden(pieces)
        assert self.graphed.takes(pieces)
        with torch.inference_mode():
            replayed = self.graphed(x_TD, position_ids(pieces).unsqueeze(0), pieces)
        return replayed, self.packed.by_modules(x_TD, pieces)

    def begin(self) -> None:
        pieces = [Piece(300, 0, [(512, 812)]), Piece(5, 0, [(0, 5)]), Piece(1, 0, [(1280, 1281)])]
        self.packed.by_modules(self.hidden(pieces), pieces)


STEPS = [
    [Piece(1, 300, [(512, 813)]), Piece(1, 5, [(0, 6)]), Piece(1, 1, [(1280, 1282)])],
    [Piece(1, 6, [(0, 7)]), Piece(1, 301, [(512, 814)])],
    [Piece(1, 7, [(0, 8)])],
    [Piece(1, 2, [(1280, 1283)]), Piece(4, 302, [(512, 818)]), Piece(1, 8, [(0, 9)])],
    [Piece(1, 3, [(1280, 1284)], torch.tensor([40])), Piece(1, 9, [(0, 10)]), Piece(1, 306, [(512, 819)])],
]
"""Single tokens, fewer sequences than before, a draft of several tokens, positions of their own."""


@pytest.mark.parametrize("model_type", sorted(families.WHOLE))
def test_replayed_passes_equal_those_by_the_modules(model_type: str) -> None:
    bench = Bench(model_type)
    bench.begin()
    for pieces in STEPS:
        replayed, wanted = bench.both_ways(pieces)
        torch.testing.assert_close(replayed, wanted, atol=1e-4, rtol=0)
    assert bench.recorder.num_recorded == 4  # of 1, 2, 4 and 8 rows


def test_windows_shorter_than_the_sequence_are_kept() -> None:
    bench = Bench("mistral", sliding_window=10)
    bench.begin()
    for pieces in STEPS:
        replayed, wanted = bench.both_ways(pieces)
        torch.testing.assert_close(replayed, wanted, atol=1e-4, rtol=0)


def test_rows_that_fill_up_a_pass_write_to_nobodys_slots() -> None:
    bench = Bench("llama")
    bench.begin()
    before = [heads.clone() for number in bench.span.blocks for heads in bench.store.heads(number)]
    bench.both_ways(STEPS[0])
    after = [heads for number in bench.span.blocks for heads in bench.store.heads(number)]
    written = {812, 5, 1281}
    for old, new in zip(before, after, strict=True):
        changed = ~((old == new) | (old.isnan() & new.isnan())).all(-1).all(1)[0]
        slots = changed.nonzero().flatten().tolist()
        assert written <= set(slots) and all(slot in written or slot >= bench.store.num_slots for slot in slots)


def test_an_answer_outlasts_the_next_pass() -> None:
    bench = Bench("llama")
    bench.begin()
    bench.both_ways(STEPS[0])
    pieces = STEPS[1]
    with torch.inference_mode():
        ids_1T = position_ids(pieces).unsqueeze(0)
        first = bench.graphed(bench.hidden(pieces), ids_1T, pieces)
        kept = first.clone()
        bench.graphed(bench.hidden(pieces), ids_1T, pieces)
    assert torch.equal(first, kept)


class NothingToWaitFor(TorchDispatchMode):
    """Refuses what would wait for the device, or bring numbers from the CPU, while a pass is recorded."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique", "is_nonzero", "equal.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class RecordsStrictly(CallsAgain):
    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with NothingToWaitFor():
            run()
        return super().record(run)


@pytest.mark.parametrize("model_type", sorted(families.WHOLE))
def test_a_pass_that_is_recorded_waits_for_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_is_window", lambda function, size: True)  # it looks at numbers of the CPU alone
    bench = Bench(model_type, RecordsStrictly(), kernel=lambda **arguments: arguments["query"])
    pieces = STEPS[0]
    with torch.inference_mode():
        bench.graphed(bench.hidden(pieces), position_ids(pieces).unsqueeze(0), pieces)
    assert bench.recorder.num_recorded == 1


def test_what_is_not_decoding_on_pages_takes_another_way() -> None:
    graphed = Bench("llama").graphed
    assert graphed.takes(STEPS[0])
    assert not graphed.takes([Piece(17, 0, [(0, 17)])])
    assert not graphed.takes([Piece(1, 4, [(10, 15)])])
    assert not graphed.takes([Piece(1, 4, [(0, 5)], key_mask_T=torch.arange(5) > 0)])
    assert not graphed.takes([Piece(1, 0, [(0, 1)])] * (MAX_ROWS + 1))


def test_sizes_that_are_recorded_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("llama")
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    bench.begin()
    for pieces in (STEPS[0], STEPS[1], STEPS[0], STEPS[1]):
        bench.both_ways(pieces)
    assert bench.recorder.num_recorded == 2 <= MAX_GRAPHS
    assert not bench.graphed.takes(STEPS[2]) and bench.graphed.takes(STEPS[1])


def test_a_size_that_cannot_be_recorded_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench("llama", Refuses())
    bench.begin()
    replayed, wanted = bench.both_ways(STEPS[0])
    torch.testing.assert_close(replayed, wanted, atol=1e-4, rtol=0)
    assert bench.graphed.takes(STEPS[0]) and not bench.graphed.takes(STEPS[2])
    assert "decoding takes longer: operation not permitted" in caplog.text


# The trial when blocks are loaded


def trial(bench: Bench, recorder: Any) -> bool:
    return replays_the_same(bench.span, bench.store, bench.pager, bench.packed.rows.over, recorder)


class Forgets(CallsAgain):
    """Plays back what it heard at first, whatever it is given later: as numbers that were baked in would do."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        results: list[Tensor] = []

        def replay() -> Tensor:
            if not results:
                results.append(run().clone())
            return results[0]

        return replay


def test_recordings_that_replay_something_else_are_found_out() -> None:
    bench = Bench("llama")
    assert trial(bench, CallsAgain())
    assert not trial(bench, Forgets()) and not trial(bench, Refuses())


def test_graphs_are_for_whole_spans_of_known_types_that_are_read_by_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: CallsAgain())
    bench, other = Bench("llama"), Bench("gemma2")
    over = bench.packed.rows.over
    assert graphed_blocks(bench.span, bench.store, bench.pager, over) is not None
    assert graphed_blocks(bench.span, bench.store, None, over) is None
    assert graphed_blocks(narrow(bench.span, BlockRange(0, 2)), bench.store, bench.pager, over) is None
    assert graphed_blocks(other.span, other.store, other.pager, other.packed.rows.over) is None
    without_scrap = KVStore(bench.store.layout, NUM_PAGES * PAGE_TOKENS)
    assert graphed_blocks(bench.span, without_scrap, bench.pager, over) is None
    assert not caplog.records
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: Forgets())
    assert graphed_blocks(bench.span, bench.store, bench.pager, over) is None
    assert caplog.messages == ["passes are not recorded, so that decoding takes longer: they give other results"]


def test_a_packed_span_decodes_by_graphs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = CallsAgain()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr("swarm.model.ragged.open_pager", lambda store, num_heads: Pager(store, page_by_page))
    span = make_span(tiny_config("llama"))
    packed = PackedSpan(span, open_store(span))
    plain = PackedSpan(span, KVStore(kv_layout(span), NUM_PAGES * PAGE_TOKENS))
    plain.fast_paths.clear()
    before, prefill = recorder.num_recorded, [Piece(20, 0, [(512, 532)]), Piece(30, 0, [(0, 30)])]
    x_TD = torch.randn(50, span.hidden_size)
    torch.testing.assert_close(packed(x_TD, prefill), plain(x_TD, prefill), atol=1e-4, rtol=0)
    assert recorder.num_recorded == before
    decode = [Piece(1, 20, [(512, 533)]), Piece(1, 30, [(0, 31)])]
    torch.testing.assert_close(packed(x_TD[:2], decode), plain(x_TD[:2], decode), atol=1e-4, rtol=0)
    assert recorder.num_recorded == before + 1
