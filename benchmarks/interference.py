"""What a long prompt, or a person who trains, does to those who decode at the same time.

All of it is measured while the same generations go on: a quiet while, then the disturbance from its beginning to its
end, and so on in turns. A time between two tokens belongs to the disturbance if any of it lies within.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from clients import Clients
from common import p50_p95, rounded, say
from tasks import Generate, Request, Train

MAX_TOKENS = 6000
"""Nobody decodes longer; far more than any run needs."""
TRAINING_S = 20.0
"""How long somebody trains each time, and at least one step."""
PATIENCE_S = 90.0
"""Who has not got what he wants after so long beside the others is told so, and counted as starved."""
PATIENCE = 6.0
"""Or after so many times as long as it takes him alone."""
NUM_ALONE = 3
"""How often the disturbance is measured alone, the first time to warm up."""

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Intrusion:
    """What one more client does while the others decode."""

    name: str
    task: Generate | Train

    @classmethod
    def prefill(cls, num_tokens: int) -> Intrusion:
        """One prompt of so many tokens, and its first token."""
        return cls(f"prefill {num_tokens}", Generate(prompt_tokens=num_tokens, new_tokens=1))

    @classmethod
    def training(cls, size: str) -> Intrusion:
        """Forward and backward with batches of a size, written 4x128."""
        batch_size, length = (int(number) for number in size.split("x"))
        return cls(f"training {size}", Train(batch_size=batch_size, length=length, seconds=TRAINING_S))

    @property
    def once(self) -> Generate | Train:
        """The same as short as it gets."""
        return replace(self.task, seconds=0.0) if isinstance(self.task, Train) else replace(self.task)

    @property
    def num_tokens(self) -> int:
        """Tokens that each of its requests brings."""
        task = self.task
        return task.batch_size * task.length if isinstance(task, Train) else task.prompt_tokens


def measure_intrusion(
    decoders: Clients,
    intruder: Clients,
    intrusion: Intrusion,
    decoding: list[Generate],
    num_samples: int,
    quiet_s: float,
) -> dict[str, Any]:
    """Let clients decode, and one more client disturb them `num_samples` times."""
    alone = [intruder.run([intrusion.once])[0] for _ in range(NUM_ALONE)][1:]
    decoders.start([replace(task, new_tokens=MAX_TOKENS) for task in decoding])
    patience_s = max(PATIENCE_S, PATIENCE * max(_seconds(requests) for requests in alone))
    quiet: list[Window] = []
    disturbed: list[list[Request]] = []
    starved = ""
    if without := decoders.wait_first_tokens(PATIENCE_S):
        starved = f"{without} of the clients had no first token after {PATIENCE_S:.0f} s, while the others decoded"
    while not starved and len(disturbed) < num_samples:
        begun_s = time.monotonic()
        time.sleep(quiet_s)
        quiet.append((begun_s, time.monotonic()))
        intruder.start([replace(intrusion.task)])
        if not intruder.wait_done(patience_s):
            starved = f"the disturbance was not done after {patience_s:.0f} s: it waited until the others had ended"
            decoders.stop()
        disturbed.append(intruder.results()[0])
        say(f"{len(decoding)} clients decode, {intrusion.name}, {len(disturbed)}: {_seconds(disturbed[-1]):.1f} s")
    decoders.stop()
    decoded = [request for requests in decoders.results() for request in requests]
    errors = [starved] if starved else _errors(decoded, disturbed)
    result = {"clients": len(decoding), "intrusion": intrusion.name, "errors": errors}
    return result | _summary(decoded, quiet, disturbed) | _speeds(intrusion, alone, disturbed)


def _errors(decoded: list[Request], disturbed: list[list[Request]]) -> list[str]:
    """What makes the numbers worthless."""
    errors = sorted({request.error for requests in [decoded, *disturbed] for request in requests if request.error})
    end_s = max((requests[-1].ended_s for requests in disturbed), default=0.0)
    if early := sum(request.ended_s < end_s for request in decoded):
        errors.append(f"{early} of the clients ended before the disturbance did")
    return errors


def _summary(decoded: list[Request], quiet: list[Window], disturbed: list[list[Request]]) -> dict[str, Any]:
    """Times between tokens without and with the disturbance."""
    pairs = [
        (_gaps(decoded, window, whole=True), _gaps(decoded, (requests[0].arrived_s, requests[-1].ended_s), whole=False))
        for window, requests in zip(quiet, disturbed, strict=True)
    ]
    without, beside = [gap for gaps, _ in pairs for gap in gaps], [gap for _, gaps in pairs for gap in gaps]
    tails = p50_p95(without), p50_p95(beside)
    return {
        "between_tokens_s": {"without": tails[0], "with": tails[1]},
        "p95_ratio": _ratio(tails[0]["p95"], tails[1]["p95"]),
        "p95_ratio_samples": [_ratio(p50_p95(gaps)["p95"], p50_p95(others)["p95"]) for gaps, others in pairs],
        "longest_between_tokens_s": {
            "without": rounded(max(without, default=None)),
            "with": rounded(max(beside, default=None)),
        },
        "num_between_tokens": {"without": len(without), "with": len(beside)},
    }


def _speeds(intrusion: Intrusion, alone: list[list[Request]], disturbed: list[list[Request]]) -> dict[str, Any]:
    """How fast the intruder was alone, and beside the others."""
    rates = [
        statistics.median(intrusion.num_tokens * len(requests) / _seconds(requests) for requests in runs)
        if runs
        else None
        for runs in (alone, disturbed)
    ]
    return {
        "intruder_tokens_per_s": {"alone": rounded(rates[0]), "beside": rounded(rates[1])},
        "intruder_ratio": _ratio(*rates),
    }


def _gaps(decoded: list[Request], window: Window, *, whole: bool) -> list[float]:
    """Times between tokens that lie within a window, wholly or in part."""
    start_s, end_s = window
    gaps = [gap for request in decoded for gap in request.gaps]
    if whole:
        return [after - before for before, after in gaps if start_s <= before and after <= end_s]
    return [after - before for before, after in gaps if before < end_s and after > start_s]


def _seconds(requests: list[Request]) -> float:
    return requests[-1].ended_s - requests[0].arrived_s


def _ratio(without: float | None, beside: float | None) -> float | None:
    return rounded(beside / without) if without and beside else None
