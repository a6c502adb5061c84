"""Teach a model a language: tokens and embeddings of its words here, and adapters in the blocks that others serve.

    python examples/new_language.py                                     three servers on this computer, a minute
    python examples/new_language.py --join swarm://v1.… --model …       a swarm that is there

The words of the new language that occur more than once become tokens of their own. Their embeddings, which are the rows
of the head too where these are tied, are trained here together with LoRA in the blocks, and saved with it: an ordinary
PEFT adapter and a tokenizer, which the whole model in this process loads at the end.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning import completions, console, new_parser, parse, plot, read_jsonl, show, some, swarm_of, train

from swarm import AutoDistributedModelForCausalLM

BATCH_SIZE = 8
LEARNING_RATE = 5e-3
OPENING = "Der"
MAX_NEW_TOKENS = 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(new_parser(__doc__ or "", steps=60, output="german-adapter"), arguments)
    texts, held_out = (
        [each["text"] for each in read_jsonl(name)] for name in ("german.jsonl", "german_held_out.jsonl")
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with (
        swarm_of(options) as link,
        closing(AutoDistributedModelForCausalLM.from_pretrained(options.model, join=link, dtype="float32")) as base,
    ):
        before = examine(base, tokenizer, held_out)
        ids = add_words(base, tokenizer, texts)
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            trainable_token_indices=ids,
        )
        model = get_peft_model(base, adapter)
        model.print_trainable_parameters()

        def next_batch() -> dict[str, torch.Tensor]:
            return completions(tokenizer, [("", spelled(tokenizer, each)) for each in some(texts, BATCH_SIZE)])

        losses = train(model, next_batch, options.steps, LEARNING_RATE)
        after = examine(model, tokenizer, held_out)
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    whole = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    whole.resize_token_embeddings(len(tokenizer))
    again = examine(PeftModel.from_pretrained(whole, options.output), tokenizer, held_out)
    show({"before": before, "after": after, "the adapter in the whole model here": again})
    console.print(f"{len(ids)} words became tokens. The adapter and the tokenizer are in {options.output}")
    plot({"LoRA and embeddings": losses}, options, "A new language over a swarm")


def add_words(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Give frequent words a token each, which begins as the mean of what they were made of; return their ids."""
    counts = collections.Counter(word for text in texts for word in re.findall(r" \w+", text))
    words = [word for word, count in counts.items() if count > 1 and len(tokenizer(word)["input_ids"]) > 1]
    parts = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    ids = list(range(len(tokenizer), len(tokenizer) + len(words)))
    tokenizer.add_tokens(words)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            for number, those in zip(ids, parts, strict=True):
                weight[number] = weight[those].mean(dim=0)
    return ids


def spelled(tokenizer: Any, text: str) -> str:
    """A sentence as the model reads it, from its beginning to its end."""
    return f"{tokenizer.bos_token or ''}{text}{tokenizer.eos_token}"


@torch.no_grad()
def examine(model: Any, tokenizer: Any, held_out: Sequence[str]) -> dict[str, str]:
    """What new sentences cost by the character, for tokens may be of any length; and how the model goes on."""
    model.eval()
    batch = completions(tokenizer, [("", spelled(tokenizer, each)) for each in held_out])
    num_predicted = int((batch["labels"][:, 1:] >= 0).sum())
    nats = float(model(**batch, use_cache=False).loss) * num_predicted
    inputs = tokenizer(f"{tokenizer.bos_token or ''}{OPENING}", add_special_tokens=False, return_tensors="pt")
    output = model.generate(
        inputs["input_ids"], max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return {
        "nats per character of new sentences": f"{nats / sum(map(len, held_out)):.3f}",
        f"{OPENING} …": " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split()),
    }


if __name__ == "__main__":
    main()
