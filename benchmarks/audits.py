"""Who is found by audits, and is anybody accused who is honest? Spans of a model and a client's decisions, no network.

python benchmarks/audits.py --model embedded --runs 100 --honest-runs 1000

A run is one sequence of 200 steps through three servers, which decode in batches of several sizes, and auditors that
recompute it in larger parts; each route in a precision drawn by chance: float32 or bfloat16, with weights in 8 bits or
not. Audits come when `Pace` says so for a share of 5%; each is taken to cost as much as a step and 0.06 more for each
token. A server is accused when a third one, of again another precision, settles it.
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import make_model, print_plain, rounded, say
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from swarm import EMBEDDED_MODEL
from swarm.client.audits import Finding, Pace, compare, settle, tolerance_of
from swarm.commitments import KEY_BYTES, Sketcher, relative_error
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.quantization import choose_scheme
from swarm.model.span import Span, load_span
from swarm.ranges import BlockRange

# B batch, T tokens, D hidden, H hops, S sides, X tokens of one run, K sums of a sketch

SPANS = [BlockRange(0, 2), BlockRange(2, 4), BlockRange(4, 6)]
PRECISIONS = [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8")]
COARSE = ("bfloat16", "int4")
PROMPT_TOKENS, NUM_STEPS, AUDIT_FRACTION = 8, 200, 0.05
BATCH_SIZES = (64, 1, 64, 8, 64, 3, 64, 16)
AUDIT_STEPS, AUDIT_STEPS_PER_TOKEN, OPENING_STEPS = 1.0, 0.06, 2.0
"""What an audit takes, in decoding steps: in all, for each token, and for a first one."""

Precision = tuple[str, str | None]
States = list[Tensor]
"""What enters the first span and what leaves each, float32 [B, T, D]."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    precisions: tuple[Precision, Precision, Precision]
    num_mismatches: int
    found_at: int | None
    """Step at which the audited server was found to be false."""
    accused_auditor: bool

    @property
    def is_mixed(self) -> bool:
        return self.precisions[0] != self.precisions[1]


class Model:
    """The spans of a checkpoint in all precisions."""

    def __init__(self, path: str) -> None:
        self._checkpoint = Checkpoint.open(CheckpointSource(path))
        self.embeddings = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_input_embeddings()
        self.spans = {each: [self.load(each, blocks) for blocks in SPANS] for each in PRECISIONS}
        self.dropped = [self.load(PRECISIONS[0], BlockRange(blocks.start, blocks.end - 1)) for blocks in SPANS]
        self.smaller = [self._smaller(blocks) for blocks in SPANS]
        self.coarser = [self.load(("float32", "int4"), blocks) for blocks in SPANS]

    def load(self, precision: Precision, blocks: BlockRange) -> Span:
        dtype, quantization = precision
        scheme = choose_scheme(quantization or "none", "cpu")
        return load_span(self._checkpoint, blocks, dtype=getattr(torch, dtype), device="cpu", scheme=scheme)

    def _smaller(self, blocks: BlockRange) -> Span:
        """Half of the intermediate features of every block are missing."""
        span = self.load(PRECISIONS[0], blocks)
        for name, weight in span.named_parameters():
            if name.endswith("down_proj.weight"):
                weight[:, weight.shape[1] // 2 :] = 0
        return span


@torch.inference_mode()
def run_span(span: Span, x_BTD: Tensor, parts: Sequence[int]) -> Tensor:
    """Run tokens through a span in parts of these lengths."""
    cache = span.new_cache(x_BTD.shape[0])
    return torch.cat([span(x_BLD, cache=cache).float() for x_BLD in x_BTD.split(list(parts), dim=1)], dim=1)


def chain(spans: Sequence[Span], x_BTD: Tensor, parts: Sequence[int]) -> States:
    states = [x_BTD]
    for span in spans:
        states.append(run_span(span, states[-1], parts))
    return states


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences that were decoded together, and recomputed in parts, in every precision."""

    decoded: dict[Precision, States]
    recomputed: dict[Precision, States]

    @classmethod
    def make(cls, model: Model, size: int, rng: random.Random) -> Batch:
        vocabulary = model.embeddings.num_embeddings
        ids = torch.tensor([[rng.randrange(3, vocabulary) for _ in range(208)] for _ in range(size)])
        x_BTD = model.embeddings(ids).detach()
        parts, rest = [], PROMPT_TOKENS + NUM_STEPS
        while rest:
            parts.append(min(rest, 8 + int(rng.expovariate(AUDIT_FRACTION))))
            rest -= parts[-1]
        decoded = {each: chain(model.spans[each], x_BTD, [PROMPT_TOKENS, *[1] * NUM_STEPS]) for each in PRECISIONS}
        return cls(decoded, {each: chain(model.spans[each], x_BTD, parts) for each in PRECISIONS})


Lie = Callable[[Model, int, Tensor, Tensor], Tensor]
"""(model, hop, what entered it, what left it; [1, T, D]) -> what the server claims."""


def noise(share: float) -> Lie:
    return lambda model, hop, x, y: y + share * y.std(-1, keepdim=True) * torch.randn_like(y)


def another(spans: str) -> Lie:
    parts = [PROMPT_TOKENS, *[1] * NUM_STEPS]
    return lambda model, hop, x, y: run_span(getattr(model, spans)[hop], x, parts)


LIES: dict[str, Lie] = {
    "noise of 3%": noise(0.03),
    "noise of 10%": noise(0.1),
    "noise of 30%": noise(0.3),
    "noise of 100%": noise(1.0),
    "stale states": lambda model, hop, x, y: torch.cat([y[:, :1], y[:, :-1]], dim=1),
    "random states": lambda model, hop, x, y: torch.randn_like(y) * y.std(),
    "last layer dropped": another("dropped"),
    "a smaller model": another("smaller"),
    "4 bits instead of what is announced": another("coarser"),
}


def run(model: Model, batch: Batch, row: int, lie: Lie | None, rng: random.Random) -> Outcome:
    """Decode, audit and judge one sequence."""
    chosen = tuple(rng.choice(PRECISIONS) for _ in range(3))
    accounts = [
        [states[row : row + 1] for states in of[precision]]
        for of, precision in zip((batch.decoded, batch.recomputed, batch.recomputed), chosen, strict=True)
    ]
    claimed = accounts[0][1:]
    if lie is not None:
        hop = rng.randrange(len(SPANS))
        claimed[hop] = lie(model, hop, accounts[0][hop], claimed[hop])
    sketchers = [Sketcher.of_key(rng.randbytes(KEY_BYTES), accounts[0][0].shape[-1]) for _ in SPANS]
    entered = [states[:-1] for states in accounts]
    left = [claimed, accounts[1][1:], accounts[2][1:]]
    committed, recomputed, settled = (
        torch.stack([torch.stack([made.sketch(x)[0], made.sketch(y)[0]]) for made, x, y in zip(*each, strict=True)])
        for each in zip([sketchers] * 3, entered, left, strict=True)
    )
    tolerances = [tolerance_of(chosen[0], chosen[1], len(blocks)) for blocks in SPANS]
    num_mismatches, wrongly = 0, False
    for start, end in audits(rng):
        verdict = compare(committed[:, :, start:end], recomputed[:, :, start:end], tolerances)
        if verdict.finding is Finding.RIGHT:
            continue
        num_mismatches += 1
        if verdict.finding is Finding.UNCLEAR:
            continue
        three = [each[verdict.hop, 1, start:end] for each in (committed, recomputed, settled)]
        errors = [float(relative_error(three[a], three[b]).mean()) for a, b in ((1, 2), (0, 2), (0, 1))]
        false = settle((errors[0], errors[1], errors[2]))
        wrongly |= false in (1, 2)
        if false == 0:
            return Outcome(chosen, num_mismatches, end - PROMPT_TOKENS, wrongly)
    return Outcome(chosen, num_mismatches, None, wrongly)


def audits(rng: random.Random) -> Iterator[tuple[int, int]]:
    """The tokens of each audit of a session."""
    pace, start, opening = Pace(AUDIT_FRACTION, rng), 0, OPENING_STEPS
    for end in range(PROMPT_TOKENS + 1, PROMPT_TOKENS + NUM_STEPS + 1):
        pace.stepped(1.0)
        if pace.is_due(end - start):
            yield start, end
            pace.took(opening + AUDIT_STEPS + AUDIT_STEPS_PER_TOKEN * (end - start))
            start, opening = end, 0.0


def differences(model: Model, rng: random.Random) -> dict[str, list[float]]:
    """By how much two honest servers of the first span differ, and two liars from one: mean and largest of a token."""
    ids = torch.tensor([[rng.randrange(3, model.embeddings.num_embeddings) for _ in range(88)] for _ in range(4)])
    x_BTD, one_by_one, by_twenty = (
        model.embeddings(ids).detach(),
        [PROMPT_TOKENS, *[1] * 80],
        [PROMPT_TOKENS, *[20] * 4],
    )
    spans = {each: model.spans[each][0] for each in PRECISIONS}
    spans[COARSE] = model.load(COARSE, SPANS[0])
    decoded = {each: run_span(span, x_BTD, one_by_one) for each, span in spans.items()}
    recomputed = {each: run_span(span, x_BTD, by_twenty) for each, span in spans.items()}
    pairs = {f"{_name(a)} / {_name(b)}": (decoded[a], recomputed[b]) for a in spans for b in spans}
    true = decoded[PRECISIONS[0]]
    pairs["noise of 10%"] = noise(0.1)(model, 0, x_BTD, true), true
    pairs["last layer dropped"] = run_span(model.dropped[0], x_BTD, one_by_one), true
    sketcher = Sketcher.of_key(rng.randbytes(KEY_BYTES), x_BTD.shape[-1])
    errors = {
        name: relative_error(sketcher.sketch(one), sketcher.sketch(other)) for name, (one, other) in pairs.items()
    }
    return {name: [rounded(float(each.mean())), rounded(float(each.max()))] for name, each in errors.items()}


def _name(precision: Precision) -> str:
    return " ".join(filter(None, precision))


def liars(model: Model, batches: Sequence[Batch], num_runs: int) -> dict[str, Any]:
    """Who is found, for each lie."""
    rows = [(batch, row) for batch in batches for row in range(batch.decoded[PRECISIONS[0]][0].shape[0])]
    results = {}
    for name, lie in LIES.items():
        outcomes = []
        for seed in range(num_runs):
            torch.manual_seed(seed)
            batch, row = rows[seed % len(rows)]
            outcomes.append(run(model, batch, row, lie, random.Random(f"{name} {seed}")))
        found = [each.found_at for each in outcomes if each.found_at is not None]
        same = [each for each in outcomes if not each.is_mixed]
        results[name] = {
            "found": len(found),
            "runs": num_runs,
            "found_where_auditor_has_same_precision": f"{sum(each.found_at is not None for each in same)}/{len(same)}",
            "median_step": statistics.median(found) if found else None,
            "last_step": max(found, default=None),
            "honest_auditors_accused": sum(each.accused_auditor for each in outcomes),
        }
        say(f"{name}: {results[name]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=("embedded", "fragile", "124M"), default="embedded", help="the latter two: random"
    )
    parser.add_argument("--runs", type=int, default=100, help="of each lie")
    parser.add_argument("--honest-runs", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small models gain nothing from more
    with tempfile.TemporaryDirectory() as directory:
        if arguments.model == "fragile":
            _save_fragile(directory)
        elif arguments.model == "124M":
            make_model("124M", "float32", directory)
        model = Model(EMBEDDED_MODEL if arguments.model == "embedded" else directory)
    differ = differences(model, random.Random(1))
    say(f"differences: {differ}")
    rng, batches, counts = random.Random(0), [], collections.Counter[str]()
    while counts["runs"] < arguments.honest_runs:
        size = BATCH_SIZES[len(batches) % len(BATCH_SIZES)]
        batches.append(Batch.make(model, size, rng))
        for row in range(min(size, arguments.honest_runs - counts["runs"])):
            outcome = run(model, batches[-1], row, None, rng)
            counts["runs"] += 1
            counts["mismatches"] += outcome.num_mismatches
            counts["accused"] += outcome.found_at is not None or outcome.accused_auditor
        say(f"honest: {dict(counts)}")
        if len(batches) > len(BATCH_SIZES):
            batches[-1] = Batch({}, {})
    found = liars(model, batches[: len(BATCH_SIZES)], arguments.runs) if batches else {}
    more = {"honest": {**counts}, "lies": found, "differences": differ, "audit_fraction": AUDIT_FRACTION}
    print_plain("audits", model=arguments.model, **more)


def _save_fragile(directory: str) -> None:
    """Random weights so large that every error grows: no trained model is as sensitive."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)


if __name__ == "__main__":
    main()
