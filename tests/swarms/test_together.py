"""Several peers train one adapter through a swarm; they find one another, come and go."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from swarm import EMBEDDED_MODEL
from swarm.server import LocalSwarm

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(150)
def test_a_run_goes_on_without_a_killed_peer_and_one_that_joins_has_what_was_learned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from peers import Peer

    with ExitStack() as owned:
        servers = LocalSwarm(EMBEDDED_MODEL, ranges=[(0, 3), (3, 6)], dtype="float32", in_process=True)
        link = owned.enter_context(servers).link

        def start(share: int) -> Any:
            flags = ["--join", link, "--run", "a run", "--share", str(share), "--steps", "1000"]
            peer = Peer(f"peer {share}", str(EXAMPLES / "train_together.py"), [*flags, "--output", str(tmp_path)])
            owned.callback(peer.kill)
            return peer

        one, other = start(0), start(1)
        for peer in (one, other):
            peer.wait_for(lambda words: words.get("num_peers", 0) > 1 and words["update"] > 1)
        other.kill()
        newcomer = start(2)
        first = newcomer.wait_for(lambda words: "update" in words)
        assert first["update"] >= 2  # it begins where the others are
        target = 0.85 * next(iter(one.losses.values()))
        learned = newcomer.wait_for(lambda words: words.get("update", 0) > first["update"] and words["loss"] < target)
        one.wait_update(learned["update"])


def test_a_peer_that_was_killed_while_it_wrote_or_before_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from peers import Peer

    script, whole = tmp_path / "peer.py", '{"update": 1, "loss": 2.0, "num_peers": 1}'
    printing = f"for said in ({whole!r} + chr(10), {whole[:20]!r}): print(said, end='', flush=True)"
    script.write_text(f"import signal\n{printing}\nsignal.pause()\n")
    peer, silent = (Peer(name, str(script), []) for name in ("half", "silent"))
    silent.kill()
    peer.wait_update(1)
    peer.kill()
    with pytest.raises(SystemExit, match="half ended too early"):
        peer.wait_update(2)
    with pytest.raises(SystemExit, match="silent failed"):
        silent.wait_done()
    assert peer.outcome["update"] == 1 and silent.outcome == {}
