"""Look into a model whose blocks are on other computers: read hidden states between the blocks, and exchange them.

    python examples/activation_patching.py                                  three servers on this computer, 20 seconds
    python examples/activation_patching.py --join swarm://v1.… --model …    a swarm that is there

The question is how a language model knows that "The files in the module" goes on with "are", and "The file in the
module" with "is". Two experiments for each depth of the model:

- Probing: a linear classifier, trained on the hidden states of some nouns, says whether other nouns are in the plural.
- Activation patching: a hidden state of the plural sentence is put into the singular one, at one depth and one token.
  How far that moves the choice between "is" and "are" shows where the number of the noun is kept.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm

# B sentences, L tokens, D hidden, N blocks

NOUNS = (
    "argument", "attribute", "field", "file", "function", "instance", "item", "key", "line", "list", "method", "name",
    "number", "object", "parameter", "string", "test", "type", "value", "variable",
)  # fmt: skip
SENTENCE = "The {} in the module"
ANSWERS = (" is", " are")

console = Console()


def main() -> None:
    options = parse_options()
    if options.plot is not None:
        find_matplotlib()
    torch.manual_seed(options.seed)
    with ExitStack() as owned:
        if options.join is None:
            torch.set_num_threads(1)  # the embedded model is too small for more
            with console.status("Starting three servers"):
                ranges = [(0, 2), (2, 4), (4, 6)]
                local = LocalSwarm(options.model, ranges=ranges, dtype="float32", arguments=["--threads", "1"])
                options.join = owned.enter_context(local).link
        model = AutoDistributedModelForCausalLM.from_pretrained(options.model, join=options.join, dtype="float32")
        owned.callback(model.close)
        model.requires_grad_(False).eval()
        sentences = read_sentences(options.model)
        singular, plural = (Reader(model.remote_blocks) for _ in range(2))
        before = [
            lean(model, sentences, ids, reader) for ids, reader in zip(sentences.ids, (singular, plural), strict=True)
        ]
        accuracies = [probe(*states) for states in zip(singular.states, plural.states, strict=True)]
        restored = patch(model, sentences, plural.states, before)
    show(sentences, before, accuracies, restored)
    if options.plot is not None:
        plot(sentences, restored, options.plot)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Read and exchange hidden states between blocks that others serve.")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="default: the small model in this package")
    parser.add_argument("--join", help="join link of a swarm; default: three servers on this computer")
    parser.add_argument("--plot", type=Path, help="write what patching shows there as a PNG; needs matplotlib")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.join is None and options.model != EMBEDDED_MODEL:
        parser.error("--model needs --join: without a link, only the model in this package is served here")
    return options


def find_matplotlib() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib: run `pip install matplotlib`, or leave the option out") from None
    return pyplot


@dataclass(frozen=True)
class Sentences:
    """The same sentence with nouns in the singular and in the plural, as token ids."""

    ids: tuple[Tensor, Tensor]
    """Singular and plural, each [B, L]."""
    tokens: list[str]
    """What stands at each place."""
    answers: tuple[int, int]
    """Token ids of the verb in the singular and in the plural."""


def read_sentences(model: str) -> Sentences:
    """Keep the nouns that are one token in both numbers, so that all sentences have their words at the same places."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [[encode(SENTENCE.format(noun)) for noun in (singular, f"{singular}s")] for singular in NOUNS]
    length = len(encode(SENTENCE.format(NOUNS[0])))
    pairs = [pair for pair in pairs if [len(ids) for ids in pair] == [length, length]]
    if len(pairs) < 8:
        raise SystemExit(
            f"only {len(pairs)} of the nouns are one token in both numbers for this model: use another one"
        )
    ids = torch.tensor(pairs)
    tokens = [tokenizer.decode(token).strip() for token in pairs[0][0]]
    place = next(index for index in range(length) if ids[0, 0, index] != ids[0, 1, index])
    tokens[place] = "(noun)"
    answers = (encode(ANSWERS[0])[0], encode(ANSWERS[1])[0])
    return Sentences((ids[:, 0], ids[:, 1]), tokens, answers)


class Reader(nn.Module):
    """The remote blocks one by one; keeps the hidden states that enter each, and those that leave the last."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = blocks
        self.states: list[Tensor] = []

    def forward(self, x_BLD: Tensor, **how: Any) -> Tensor:
        self.states = [x_BLD]
        for index in range(len(self.blocks)):
            x_BLD = self.blocks[index](x_BLD, **how)
            self.states.append(x_BLD)
        return x_BLD


class Patched(nn.Module):
    """All remote blocks, with one hidden state exchanged before block `depth`."""

    def __init__(self, blocks: Any, depth: int, place: int, states_BLD: Tensor) -> None:
        super().__init__()
        self.blocks, self.depth, self.place, self.states_BLD = blocks, depth, place, states_BLD

    def forward(self, x_BLD: Tensor, **how: Any) -> Tensor:
        if self.depth:
            x_BLD = self.blocks[: self.depth](x_BLD, **how)
        x_BLD = x_BLD.clone()
        x_BLD[:, self.place] = self.states_BLD[:, self.place]
        return self.blocks[self.depth :](x_BLD, **how) if self.depth < len(self.blocks) else x_BLD


@torch.no_grad()
def lean(model: Any, sentences: Sentences, ids: Tensor, through: nn.Module) -> Tensor:
    """How much likelier the plural verb is than the singular one as the next word, in nats; [B]."""
    with model.run_through(through):
        logits = model(ids, use_cache=False).logits[:, -1]
    singular, plural = sentences.answers
    return logits[:, plural] - logits[:, singular]


def probe(singular_BLD: Tensor, plural_BLD: Tensor) -> float:
    """Train a linear classifier on the last token's states of half of the nouns; its accuracy on the other half."""
    x = torch.stack([singular_BLD[:, -1], plural_BLD[:, -1]])
    x = (x - x.mean((0, 1))) / (x.std((0, 1)) + 1e-6)
    y = torch.tensor([[0.0], [1.0]]).expand(2, x.shape[1])
    classifier = nn.Linear(x.shape[-1], 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(100):
        loss = nn.functional.binary_cross_entropy_with_logits(classifier(x[:, ::2]).squeeze(-1), y[:, ::2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((classifier(x[:, 1::2]).squeeze(-1) > 0) == (y[:, 1::2] > 0)).float().mean().item()


def patch(model: Any, sentences: Sentences, states: list[Tensor], before: list[Tensor]) -> Tensor:
    """For each depth and token, how much of the way from singular to plural the verb goes; [N + 1, L]."""
    singular, plural = (each.mean() for each in before)
    places = [(depth, place) for depth in range(len(states)) for place in range(len(sentences.tokens))]
    restored = torch.zeros(len(states), len(sentences.tokens))
    for depth, place in track(places, "patching", console=console):
        patched = Patched(model.remote_blocks, depth, place, states[depth])
        restored[depth, place] = (lean(model, sentences, sentences.ids[0], patched).mean() - singular) / (
            plural - singular
        )
    return restored


def show(sentences: Sentences, before: list[Tensor], accuracies: list[float], restored: Tensor) -> None:
    console.print(
        f"{len(sentences.ids[0])} nouns; 'are' against 'is' on average: {before[0].mean():+.2f} nats after the "
        f"singular, {before[1].mean():+.2f} after the plural"
    )
    table = Table(
        "before block", "probe", *sentences.tokens, title="Share of the difference that one state carries over"
    )
    for depth, row in enumerate(restored.tolist()):
        name = str(depth) if depth < len(restored) - 1 else "the head"
        table.add_row(name, f"{accuracies[depth]:.0%}", *[f"{share:.0%}" for share in row])
    console.print(table)


def plot(sentences: Sentences, restored: Tensor, path: Path) -> None:
    figure, axes = find_matplotlib().subplots(figsize=(6, 4), layout="constrained")
    image = axes.imshow(restored, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    axes.set_xticks(range(len(sentences.tokens)), sentences.tokens)
    axes.set(ylabel="exchanged before block", title="Where the number of the noun is kept")
    figure.colorbar(image, label="share of the difference carried over")
    figure.savefig(path, dpi=120)
    console.print(f"The shares are drawn in {path}")


if __name__ == "__main__":
    main()
