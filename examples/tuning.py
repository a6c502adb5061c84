"""What the examples share: their command line, servers to try them on, a training loop, tables and plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoTokenizer

from swarm import EMBEDDED_MODEL
from swarm.server import LocalSwarm

DATA = Path(__file__).parent / "data"
MAX_ANSWER_TOKENS = 40
IGNORED = -100
"""A label that counts for nothing, as Hugging Face has it."""

console = Console()


def new_parser(description: str, *, steps: int, output: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="default: the small model in this package")
    parser.add_argument("--join", help="join link of a swarm; default: three servers on this computer")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default: {steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"a folder; default: {output}")
    parser.add_argument(
        "--plot",
        type=Path,
        help="where to draw the losses as a PNG; default: loss.png in that folder",
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; start as it says, with the same random numbers each time."""
    options = parser.parse_args(arguments)
    if options.join is None and options.model != EMBEDDED_MODEL:
        parser.error("--model needs --join: without a link, only the model in this package is served here")
    if options.plot is not None and not has_matplotlib():
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    return options


@contextmanager
def swarm_of(options: argparse.Namespace) -> Iterator[str]:
    """A join link: of the swarm that was named, or of three servers on this computer."""
    if options.join is not None:
        yield options.join
        return
    torch.set_num_threads(1)  # the embedded model is too small for more
    with ExitStack() as owned:
        with console.status("Starting three servers"):
            ranges = [(0, 2), (2, 4), (4, 6)]
            servers = LocalSwarm(options.model, ranges=ranges, dtype="float32", arguments=["--threads", "1"])
            owned.enter_context(servers)
        yield servers.link


def read_jsonl(name: str) -> list[dict[str, str]]:
    """What is in a file of examples/data."""
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


class Chat:
    """Questions and answers as token ids; what a model makes of those that it was not trained on."""

    def __init__(
        self, model: str, training: Sequence[Mapping[str, str]], held_out: Sequence[Mapping[str, str]]
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.training, self.held_out = training, held_out
        # Without a penalty on words of the question, which an answer may well repeat.
        self.decoding: dict[str, Any] = {
            "max_new_tokens": MAX_ANSWER_TOKENS,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "pad_token_id": self.tokenizer.eos_token_id,
        }

    def prompt(self, question: str) -> str:
        return f"{self.tokenizer.bos_token or ''}Question: {question}\nAnswer:"

    def batch(self, exchanges: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
        """Padded on the right; only answers are to be learned."""
        pairs = [(self.prompt(each["question"]), f" {each['answer']}{self.tokenizer.eos_token}") for each in exchanges]
        return completions(self.tokenizer, pairs)

    def chosen(self, num: int) -> dict[str, torch.Tensor]:
        """A batch of exchanges to learn from, each time others."""
        return self.batch(some(self.training, num))

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Nats per token of the answers that were held out."""
        model.eval()
        return float(model(**self.batch(self.held_out), use_cache=False).loss)

    def answer(self, model: Any, question: str) -> str:
        inputs = self.tokenizer(
            self.prompt(question), add_special_tokens=False, return_tensors="pt", return_token_type_ids=False
        )
        output = model.generate(**inputs, **self.decoding)
        return " ".join(
            self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()
        )

    def examine(self, model: Any, num_answers: int) -> dict[str, str]:
        """The loss on the exchanges that were held out, and the model's own answers to some of them."""
        found = {"loss on new questions": f"{self.loss(model):.3f}"}
        for each in self.held_out[:num_answers]:
            found[each["question"]] = self.answer(model, each["question"])
        return found


def completions(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Prompts with what shall follow, padded on the right; only the latter has labels."""
    rows, labels = [], []
    for prompt, completion in pairs:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        rows.append(torch.tensor(before + after))
        labels.append(torch.tensor([IGNORED] * len(before) + after))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def some(items: Sequence[Any], num: int) -> list[Any]:
    """So many of them at random, each once at most."""
    return [items[number] for number in torch.randperm(len(items))[:num].tolist()]


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer shall have."""
    return [each for each in module.parameters() if each.requires_grad]


def train(
    model: Any, next_batch: Callable[[], Mapping[str, Any]], num_steps: int, learning_rate: float
) -> dict[int, float]:
    """An ordinary training loop; returns the loss of each step, the first of which is 1."""
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=learning_rate)
    losses: dict[int, float] = {}
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=num_steps)
        for step in range(1, num_steps + 1):
            loss = model(**next_batch(), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.item()
            progress.update(task, advance=1, description=f"loss {losses[step]:.3f}")
    return losses


def show(columns: Mapping[str, Mapping[str, str]]) -> None:
    """A table of what was found, a column for each time."""
    table = Table("", *columns, show_lines=True)
    for name in next(iter(columns.values())):
        table.add_row(name, *(found[name] for found in columns.values()))
    console.print(table)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(curves: Mapping[str, Mapping[int, float]], options: argparse.Namespace, title: str) -> None:
    """Draw losses by step into a PNG, if matplotlib is installed."""
    if not has_matplotlib():
        console.print("The losses are not drawn: that takes `pip install matplotlib`")
        return
    from matplotlib.figure import Figure

    path = options.plot or options.output / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), label=name)
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    console.print(f"The losses are drawn in {path}")
