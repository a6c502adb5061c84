"""A chatbot that knows you: teach a model your facts with LoRA, then talk to it in one session.

    python examples/personal_chatbot.py --chat                          three servers on this computer, a minute
    python examples/personal_chatbot.py --join swarm://v1.… --model …   a swarm that is there
    python examples/personal_chatbot.py --load personal-adapter --chat  without training again

The facts are in examples/data/personal.jsonl: write yours there. The adapter stays here, and servers apply it to our
calls only. A chat is one session: servers remember what was said, until it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tuning import MAX_ANSWER_TOKENS, Chat, console, new_parser, parse, plot, read_jsonl, show, swarm_of, train

from swarm import AutoDistributedModelForCausalLM

BATCH_SIZE = 8
LEARNING_RATE = 5e-3
NUM_ANSWERS = 4
MAX_CHAT_TOKENS = 400


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__ or "", steps=80, output="personal-adapter")
    parser.add_argument("--load", type=Path, help="an adapter that was trained before; nothing is trained then")
    parser.add_argument("--chat", action="store_true", help="talk to it at the end; an empty line ends the chat")
    options = parse(parser, arguments)
    chat = Chat(options.model, read_jsonl("personal.jsonl"), read_jsonl("personal_held_out.jsonl"))
    auto = AutoDistributedModelForCausalLM
    with swarm_of(options) as link, closing(auto.from_pretrained(options.model, join=link, dtype="float32")) as base:
        if options.load is not None:
            model = PeftModel.from_pretrained(base, options.load)
            show({"now": chat.examine(model, NUM_ANSWERS)})
        else:
            before = chat.examine(base, NUM_ANSWERS)
            lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            model = get_peft_model(base, lora)
            losses = train(model, lambda: chat.chosen(BATCH_SIZE), options.steps, LEARNING_RATE)
            show({"before": before, "after": chat.examine(model, NUM_ANSWERS)})
            model.save_pretrained(options.output)
            console.print(f"The adapter is in {options.output}; loss of the last step: {losses[options.steps]:.3f}")
            plot({"LoRA": losses}, options, "A personal chatbot")
        if options.chat:
            talk(model, chat)


def talk(model: Any, chat: Chat) -> None:
    """Answer questions in one session, until an empty line, the end of the input, or no room."""
    end = chat.tokenizer.eos_token
    with model.inference_session(max_length=MAX_CHAT_TOKENS) as session:
        said = ""
        while session.position < MAX_CHAT_TOKENS - 2 * MAX_ANSWER_TOKENS:
            try:
                question = console.input("[bold]You:[/bold] ").strip()
            except EOFError:
                break
            if not question:
                break
            text = f"{said}{chat.prompt(question)}"
            inputs = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
            if inputs["input_ids"].shape[1] > MAX_ANSWER_TOKENS:
                console.print("That is too long for me.")
                continue
            output = model.generate(inputs["input_ids"], **chat.decoding)
            answer = chat.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            console.print("[bold]Bot:[/bold]", " ".join(answer.split()))
            said = "" if answer.endswith(end) else end


if __name__ == "__main__":
    main()
