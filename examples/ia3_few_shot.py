"""Teach a model a task from 32 examples with IA3, which learns a factor for each feature of some layers and no more.

    python examples/ia3_few_shot.py                                  three servers on this computer, half a minute
    python examples/ia3_few_shot.py --join swarm://v1.… --model …    a swarm that is there

The task: continue a sentence of Python's documentation with what it is about, numbers or files. The factors are here;
servers apply them to our calls. What is saved is an ordinary PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from peft import IA3Config, get_peft_model
from sentences import LABELS, Example, numbers_or_files
from transformers import AutoTokenizer
from tuning import IGNORED, completions, console, new_parser, parse, plot, show, some, swarm_of, train

from swarm import AutoDistributedModelForCausalLM

NUM_SHOTS, NUM_HELD_OUT = 32, 100
BATCH_SIZE = 8
LEARNING_RATE = 3e-2
TARGETS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(new_parser(__doc__ or "", steps=40, output="few-shot-adapter"), arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    shots, held_out = numbers_or_files(NUM_SHOTS, NUM_HELD_OUT, options.seed)
    with (
        swarm_of(options) as link,
        closing(AutoDistributedModelForCausalLM.from_pretrained(options.model, join=link, dtype="float32")) as base,
    ):
        model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **TARGETS))
        model.print_trainable_parameters()
        before = accuracy(model, tokenizer, held_out)

        def next_batch() -> dict[str, torch.Tensor]:
            return completions(tokenizer, [pair(each, each.label) for each in some(shots, BATCH_SIZE)])

        losses = train(model, next_batch, options.steps, LEARNING_RATE)
        after = accuracy(model, tokenizer, held_out)
        model.save_pretrained(options.output)
    columns = {"before": before, f"after {NUM_SHOTS} examples": after}
    show({name: {f"right of {NUM_HELD_OUT} new sentences": f"{found:.0%}"} for name, found in columns.items()})
    console.print(f"The adapter is in {options.output}; loss of the last step: {losses[options.steps]:.3f}")
    plot({"IA3": losses}, options, "IA3 from a few examples")


def pair(example: Example, label: int) -> tuple[str, str]:
    """What the model is given, and how it may go on."""
    return f"{example.text}\nThis is about", f" {LABELS[label]}"


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Share of the sentences that it rather continues with the right label than with another."""
    model.eval()
    likelihoods = []
    for label in range(len(LABELS)):
        batch = completions(tokenizer, [pair(each, label) for each in examples])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        scores = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
        )
        likelihoods.append(-scores.sum(dim=1))
    found = torch.stack(likelihoods).argmax(dim=0)
    return float((found == torch.tensor([each.label for each in examples])).float().mean())


if __name__ == "__main__":
    main()
