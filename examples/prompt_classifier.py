"""Teach a model to tell two kinds of sentences apart: trainable prompts and a classification head, over a swarm.

    python examples/prompt_classifier.py                                  three servers on this computer, a minute
    python examples/prompt_classifier.py --join swarm://v1.… --model …    a swarm that is there

The sentences are the first ones of what Python documents about numbers and about files. Batches are padded on the left,
for the head looks at the last position of each row, which has to be the last token of its sentence. Trained are eight
virtual tokens and the head, which both are here; the same is then done with the whole model in this process, from the
same beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from sentences import LABELS, Example, numbers_or_files
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tuning import new_parser, parse, plot, show, some, swarm_of, train

from swarm import AutoDistributedModelForSequenceClassification

NUM_TRAINING, NUM_HELD_OUT = 256, 200
BATCH_SIZE = 16
LEARNING_RATE = 2e-2
NUM_VIRTUAL_TOKENS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(new_parser(__doc__ or "", steps=60, output="classifier-prompts"), arguments)
    task = Task(options.model, options.seed)
    new = {"num_labels": len(LABELS), "pad_token_id": task.tokenizer.pad_token_id, "dtype": "float32"}
    auto = AutoDistributedModelForSequenceClassification
    with swarm_of(options) as link, closing(auto.from_pretrained(options.model, join=link, **new)) as base:
        remote = task.learn(base, options.steps, options.seed)
        remote["model"].save_pretrained(options.output)
    whole = AutoModelForSequenceClassification.from_pretrained(options.model, **new)
    local = task.learn(whole, options.steps, options.seed)
    columns = {"before": remote["before"], "after": remote["after"], "the whole model here": local["after"]}
    show({name: {f"right of {NUM_HELD_OUT} new sentences": f"{found:.1%}"} for name, found in columns.items()})
    plot({"swarm": remote["losses"], "local": local["losses"]}, options, "Prompt tuning of a classifier")


class Task:
    """Sentences as padded batches, and how many of those that are new a model gets right."""

    def __init__(self, model: str, seed: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.training, self.held_out = numbers_or_files(NUM_TRAINING, NUM_HELD_OUT, seed)

    def batch(self, examples: Sequence[Example]) -> Mapping[str, torch.Tensor]:
        texts = [each.text for each in examples]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        return {**batch, "labels": torch.tensor([each.label for each in examples])}

    def learn(self, base: Any, num_steps: int, seed: int) -> dict[str, Any]:
        """Train new prompts and a new head; return what they are worth before and after, and the losses."""
        torch.manual_seed(seed)
        torch.nn.init.normal_(base.score.weight, std=0.02)
        model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=NUM_VIRTUAL_TOKENS))
        before = self.accuracy(model)
        losses = train(model, lambda: self.batch(some(self.training, BATCH_SIZE)), num_steps, LEARNING_RATE)
        return {"model": model, "before": before, "after": self.accuracy(model), "losses": losses}

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Share of the held-out sentences whose label it finds."""
        model.eval()
        right = 0
        for start in range(0, NUM_HELD_OUT, 50):
            batch = self.batch(self.held_out[start : start + 50])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            right += int((logits.argmax(dim=-1) == batch["labels"]).sum())
        return right / NUM_HELD_OUT


if __name__ == "__main__":
    main()
