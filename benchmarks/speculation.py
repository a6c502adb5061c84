"""Over a slow line, what do drafted tokens gain where text repeats itself, and cost where it does not?

Real servers of the embedded model behind shaped links. Each text is continued plainly and with drafts in turns; the
ratio is that of tokens per second, drafts to plain. Where the likeliest token is taken, both must give the same tokens.

    repetitive  the model's own words, from where it has come to go in a circle, as small models do: greedy
    ordinary    what it says first after a few words: greedy
    random      any tokens, and any are drawn next (a high temperature): drafts are never right, and rarely found
    few         random ones of a handful: drafts are always found, and never right
    assistant   repetitive, and the drafts come from the same model on this machine

python benchmarks/speculation.py --rtt-ms 100
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from common import print_plain, rounded, say
from transformers import AutoModelForCausalLM, AutoTokenizer
from wan import Line, shaped_swarm

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM

BEGINNINGS = ("The first argument", "If the value is", "import os", "def main():", "The server", "Return a list")

MAX_CIRCLE = 16
"""Tokens after which text that goes in a circle is where it was."""

NUM_TURNS = 4
"""So often it must have gone round to be taken for that."""

MAX_OWN_TOKENS = 320
NUM_FEW = 6
NUM_RANDOM = 64
HOT = 50.0
"""A temperature at which all tokens are about equally likely."""


def circles(tokens: Sequence[int]) -> bool:
    """Whether tokens end with the same few over and over."""
    return any(
        all(tokens[-at] == tokens[-at - length] for at in range(1, (NUM_TURNS - 1) * length + 1))
        for length in range(1, min(MAX_CIRCLE, len(tokens) // NUM_TURNS) + 1)
    )


def repetitive_ids(local: Any, ids: torch.Tensor) -> torch.Tensor:
    """The text that begins so, as the model goes on with it, up to where it begins to go in a circle."""
    text = local.generate(ids, max_new_tokens=MAX_OWN_TOKENS, min_new_tokens=MAX_OWN_TOKENS, do_sample=False)
    tokens = text[0].tolist()
    if not circles(tokens):
        raise SystemExit(f"the text that begins with {tokens[: ids.shape[1]]} never repeats itself: take another one")
    end = next(end for end in range(len(tokens)) if all(map(circles, (tokens[:at] for at in range(end, len(tokens))))))
    return text[:, :end]


def random_ids(seed: int, num_different: int, vocab_size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    some = torch.randint(0, vocab_size, (num_different,), generator=draw)
    return some[torch.randint(0, num_different, (1, NUM_RANDOM), generator=draw)]


def generated(model: Any, ids: torch.Tensor, num_tokens: int, seed: int, **options: Any) -> tuple[torch.Tensor, float]:
    """The text with so many tokens more, and the seconds that they took."""
    torch.manual_seed(seed)
    began_s = time.monotonic()
    text = model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **options)
    return text, time.monotonic() - began_s


def measure(
    model: Any,
    text: str,
    prompts: Sequence[torch.Tensor],
    num_tokens: int,
    num_samples: int,
    drafts: dict[str, Any],
    choice: dict[str, Any],
) -> dict[str, Any]:
    """Both ways, in turns, a text a sample; every text's drafts are new to the model."""
    plain_s, drafted_s = [], []
    for sample, ids in enumerate(itertools.islice(itertools.cycle(prompts), num_samples)):
        plain, seconds = generated(model, ids, num_tokens, sample, **choice)
        plain_s.append(seconds)
        drafted, seconds = generated(model, ids, num_tokens, sample, **choice, **drafts)
        drafted_s.append(seconds)
        if not choice["do_sample"] and not torch.equal(plain, drafted):
            raise SystemExit(f"{text}: with drafts the tokens are other ones")
    ratios = [plain / drafted for plain, drafted in zip(plain_s, drafted_s, strict=True)]
    say(f"{text}: {statistics.median(ratios):.2f} times as fast, {min(ratios):.2f} at least")
    return {
        "text": text,
        "plain_tokens_per_s": rounded(num_tokens / statistics.median(plain_s)),
        "drafted_tokens_per_s": rounded(num_tokens / statistics.median(drafted_s)),
        "ratio": rounded(statistics.median(ratios)),
        "ratios": [rounded(ratio) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, default=100.0)
    parser.add_argument("--mbit-per-s", type=float, default=100.0)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--drafted", type=int, default=10, help="prompt_lookup_num_tokens: the most")
    parser.add_argument("--texts", default="repetitive,ordinary,random,few,assistant")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    local = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    beginnings = [tokenizer(text, return_tensors="pt")["input_ids"] for text in BEGINNINGS[: arguments.samples]]
    circling = [repetitive_ids(local, ids) for ids in beginnings]
    vocab_size, seeds = local.config.vocab_size, range(arguments.samples)
    lookup, greedy = {"prompt_lookup_num_tokens": arguments.drafted}, {"do_sample": False}
    hot = {"do_sample": True, "temperature": HOT, "top_k": 0}
    texts: dict[str, tuple[Sequence[torch.Tensor], dict[str, Any], dict[str, Any]]] = {
        "repetitive": (circling, lookup, greedy),
        "ordinary": (beginnings, lookup, greedy),
        "random": ([random_ids(seed, vocab_size, vocab_size) for seed in seeds], lookup, hot),
        "few": ([random_ids(seed, NUM_FEW, vocab_size) for seed in seeds], lookup, hot),
        "assistant": (circling, {"assistant_model": local}, greedy),
    }
    with ExitStack() as owned:
        swarm, shaper = owned.enter_context(shaped_swarm(EMBEDDED_MODEL, [(0, 2), (2, 4), (4, 6)], "float32"))
        remote = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, join=swarm.link, dtype="float32")
        owned.callback(remote.close)
        generated(remote, beginnings[0], 4, 0, do_sample=False)  # connections, buffers
        shaper.set(Line(arguments.mbit_per_s, arguments.rtt_ms).quality, range(3))
        generated(remote, beginnings[0], 4, 0, do_sample=False)
        rows = []
        for text in arguments.texts.split(","):
            prompts, drafts, choice = texts[text]
            rows.append(measure(remote, text, prompts, arguments.tokens, arguments.samples, drafts, choice))
    print_plain("speculation", **vars(arguments), num_servers=3, rows=rows)


if __name__ == "__main__":
    main()
