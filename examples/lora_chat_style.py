"""Teach a model a way of speaking with LoRA, through blocks that other people serve and that never change.

    python examples/lora_chat_style.py                                  three servers on this computer, 30 seconds
    python examples/lora_chat_style.py --join swarm://v1.… --model …    a swarm that is there

The adapter's parameters, their gradients and the optimizer are here; the servers apply it to our calls only. What is
saved is an ordinary PEFT adapter: at the end the whole model in this process loads it, and says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from tuning import Chat, console, new_parser, parse, plot, read_jsonl, show, swarm_of, train

from swarm import AutoDistributedModelForCausalLM

BATCH_SIZE = 8
LEARNING_RATE = 5e-3
NUM_ANSWERS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(new_parser(__doc__ or "", steps=40, output="chat-style-adapter"), arguments)
    chat = Chat(options.model, read_jsonl("chat_style.jsonl"), read_jsonl("chat_style_held_out.jsonl"))
    with (
        swarm_of(options) as link,
        closing(AutoDistributedModelForCausalLM.from_pretrained(options.model, join=link, dtype="float32")) as base,
    ):
        model = get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05)
        )
        model.print_trainable_parameters()
        before = chat.examine(model, NUM_ANSWERS)
        losses = train(model, lambda: chat.chosen(BATCH_SIZE), options.steps, LEARNING_RATE)
        after = chat.examine(model, NUM_ANSWERS)
        model.save_pretrained(options.output)
    whole = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    again = chat.examine(PeftModel.from_pretrained(whole, options.output), NUM_ANSWERS)
    show({"before": before, "after": after, "the adapter in the whole model here": again})
    console.print(f"The adapter is in {options.output}; loss of the last step: {losses[options.steps]:.3f}")
    plot({"LoRA": losses}, options, "LoRA over a swarm")


if __name__ == "__main__":
    main()
