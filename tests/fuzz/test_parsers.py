"""Whatever bytes a stranger sends: refused or read, quickly, in little memory. `scripts/fuzz` does it for hours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from campaign import MAX_GROWTH_BYTES, Outcome, memory_bytes, run, share, warm_up
from targets import CORPUS, Target, all_targets

NUM_INPUTS = 40_000


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    found = all_targets(tmp_path_factory.mktemp("files"))
    warm_up(found)
    return {target.name: target for target in found}


@pytest.fixture(scope="module", autouse=True)
def counted(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Iterator[list[Outcome]]:
    """Says at the end how many inputs there were, and that they left no memory behind."""
    found: list[Outcome] = []
    before = memory_bytes()
    yield found
    grown = memory_bytes() - before
    total, slowest_ms = sum(each.num_inputs for each in found), max(each.slowest_ms for each in found)
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\nfuzzed with {total} inputs, the slowest took {slowest_ms:.0f} ms")
    assert grown <= MAX_GROWTH_BYTES


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_malformed_bytes_are_refused_in_time_and_in_little_memory(
    name: str, targets: dict[str, Target], counted: list[Outcome]
) -> None:
    target = targets[name]
    outcome = run(target, share(target, list(targets.values()), NUM_INPUTS), seed=0)
    counted.append(outcome)
    assert not outcome.failures, outcome.failures[0]


def test_every_way_in_has_a_corpus_of_good_inputs(targets: dict[str, Target]) -> None:
    assert targets.keys() == {path.name for path in CORPUS.iterdir()}
    for target in targets.values():
        for data in target.corpus():
            if target.name not in ("config", "bucket", "stream"):  # they need more than bytes, or refuse nothing
                target.run(data)
