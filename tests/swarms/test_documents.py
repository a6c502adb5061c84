"""Every Python block of the documents runs as it stands, on the model that ships with Swarm."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm import EMBEDDED_MODEL
from swarm.server import LocalSwarm

ROOT = Path(__file__).parents[2]
PLACEHOLDER = "swarm://…"
"""What documents show in place of a join link."""

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(path: Path) -> list[str]:
    """The Python blocks of a document, each behind as many empty lines as precede it, so that errors name its lines."""
    text = path.read_text()
    return ["\n" * (text.count("\n", 0, found.start(1))) + found[1] for found in _BLOCK.finditer(text)]


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    if blocks_of(path)
)


@pytest.fixture(scope="module")
def link() -> Iterator[str]:
    with LocalSwarm(EMBEDDED_MODEL, ranges=[(0, 2), (2, 4), (4, 6)], in_process=True) as swarm:
        yield swarm.link


def run_document(path: Path, link: str) -> tuple[dict[str, Any], str]:
    """Run a document's blocks one after another; return what names they left and what they printed."""
    names: dict[str, Any] = {"MODEL": EMBEDDED_MODEL, "LINK": link}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks_of(path):
            exec(compile(block.replace(PLACEHOLDER, link), path, "exec"), names)
    return names, printed.getvalue()


def clients() -> set[threading.Thread]:
    """The loops of clients that have not left their swarm."""
    return {thread for thread in threading.enumerate() if thread.name == "swarm-client"}


def check_readme(names: dict[str, Any], printed: str) -> None:
    """The training program has learned its sentence; the slice of remote blocks has answered."""
    assert "A quick brown fox did not jump over the lazy dog" in printed.splitlines()
    assert names["loss"].item() < 0.1
    assert names["hidden"].shape == (*names["inputs"].shape, names["model"].config.hidden_size)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_a_document_runs(document: str, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some save files
    before = clients()
    names, printed = run_document(ROOT / document, link)
    if document == "README.md":
        check_readme(names, printed)
    names.clear()
    gc.collect()
    assert clients() <= before  # they leave when their models are gone
