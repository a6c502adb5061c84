"""Teach a model a way of speaking with LoRA, through blocks that other people serve and that never change.

    python examples/lora_chat_style.py                                  three servers on this computer, 30 seconds
    python examples/lora_chat_style.py --join swarm://v1.… --model …    a swarm that is there

The adapter's parameters, their gradients and the optimizer are here; the servers apply it to our calls only. What is
saved is an ordinary PEFT adapter: at the end the whole model in this process loads it, and says the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm

DATA = Path(__file__).parent / "data"
BATCH_SIZE = 8
LEARNING_RATE = 5e-3
NUM_ANSWERS = 3
MAX_ANSWER_TOKENS = 40

console = Console()


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    with ExitStack() as owned:
        if options.join is None:
            torch.set_num_threads(1)  # the embedded model is too small for more
            with console.status("Starting three servers"):
                ranges = [(0, 2), (2, 4), (4, 6)]
                local = LocalSwarm(options.model, ranges=ranges, dtype="float32", arguments=["--threads", "1"])
                options.join = owned.enter_context(local).link
        base = AutoDistributedModelForCausalLM.from_pretrained(options.model, join=options.join, dtype="float32")
        owned.callback(base.close)
        chat = Chat(options.model)
        model = get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05)
        )
        model.print_trainable_parameters()
        before = chat.examine(model)
        losses = train(model, chat, options.steps)
        after = chat.examine(model)
        model.save_pretrained(options.output)
        whole = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        again = chat.examine(PeftModel.from_pretrained(whole, options.output))
    show(before, after, again)
    console.print(f"The adapter is in {options.output}; loss of the last step: {losses[-1]:.3f}")
    if options.plot is not None:
        plot(losses, options.plot)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a model a way of speaking with LoRA over a swarm.")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="default: the small model in this package")
    parser.add_argument("--join", help="join link of a swarm; default: three servers on this computer")
    parser.add_argument("--steps", type=int, default=40, help=f"of {BATCH_SIZE} exchanges each")
    parser.add_argument("--output", type=Path, default=Path("chat-style-adapter"), help="where the adapter is saved")
    parser.add_argument("--plot", type=Path, help="write the losses there as a PNG; needs matplotlib")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.join is None and options.model != EMBEDDED_MODEL:
        parser.error("--model needs --join: without a link, only the model in this package is served here")
    return options


class Chat:
    """Questions and answers as token ids; what a model makes of those that it was not trained on."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.training, self.held_out = (read(DATA / name) for name in ("chat_style.jsonl", "chat_style_held_out.jsonl"))

    def prompt(self, question: str) -> str:
        return f"{self.tokenizer.bos_token or ''}Question: {question}\nAnswer:"

    def batch(self, exchanges: Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Padded on the right; only answers are to be learned."""
        rows, labels = [], []
        for each in exchanges:
            question = self.tokenizer(self.prompt(each["question"]))["input_ids"]
            answer = self.tokenizer(f" {each['answer']}{self.tokenizer.eos_token}")["input_ids"]
            rows.append(torch.tensor(question + answer))
            labels.append(torch.tensor([-100] * len(question) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.tokenizer.eos_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    @torch.no_grad()
    def examine(self, model: Any) -> dict[str, str]:
        """The loss on the exchanges that were held out, and the model's own answers to some of them."""
        model.eval()
        found = {"loss on new questions": f"{model(**self.batch(self.held_out), use_cache=False).loss.item():.3f}"}
        for each in self.held_out[:NUM_ANSWERS]:
            inputs = self.tokenizer(self.prompt(each["question"]), return_tensors="pt", return_token_type_ids=False)
            output = model.generate(
                **inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, pad_token_id=self.tokenizer.eos_token_id
            )
            answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found[each["question"]] = " ".join(answer.split())
        return found


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def train(model: Any, chat: Chat, num_steps: int) -> list[float]:
    """An ordinary training loop; returns the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=LEARNING_RATE)
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=num_steps)
        for _ in range(num_steps):
            chosen = torch.randperm(len(chat.training))[:BATCH_SIZE].tolist()
            loss = model(**chat.batch([chat.training[number] for number in chosen]), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses


def show(before: dict[str, str], after: dict[str, str], local: dict[str, str]) -> None:
    table = Table("", "before", "after", "the adapter in the whole model here", show_lines=True)
    for name in before:
        table.add_row(name, before[name], after[name], local[name])
    console.print(table)


def plot(losses: Sequence[float], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="LoRA over a swarm")
    figure.savefig(path, dpi=120)
    console.print(f"The losses are drawn in {path}")


if __name__ == "__main__":
    main()
