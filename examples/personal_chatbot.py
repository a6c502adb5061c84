"""A chatbot that knows you: teach a model your facts with trainable prompts in every block, then talk to it.

    python examples/personal_chatbot.py --chat                          three servers on this computer, a minute
    python examples/personal_chatbot.py --join swarm://v1.… --model …   a swarm that is there
    python examples/personal_chatbot.py --load personal-prompts.safetensors --chat      without training again

The facts are in examples/data/personal.jsonl: write yours there. Trained are 16 virtual tokens for each block; servers
add them to our calls and keep nothing. A chat is one session: servers remember what was said, until it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tuning import MAX_ANSWER_TOKENS, Chat, console, new_parser, parse, plot, show, swarm_of, train

from swarm import AutoDistributedModelForCausalLM

NUM_VIRTUAL_TOKENS = 16
BATCH_SIZE = 8
LEARNING_RATE = 2e-2
NUM_ANSWERS = 4
MAX_CHAT_TOKENS = 400


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__ or "", steps=80, output="personal-prompts.safetensors")
    parser.add_argument("--load", type=Path, help="prompts that were trained before; nothing is trained then")
    parser.add_argument("--chat", action="store_true", help="talk to it at the end; an empty line ends the chat")
    options = parse(parser, arguments)
    chat = Chat(options.model, "personal.jsonl", "personal_held_out.jsonl")
    auto = AutoDistributedModelForCausalLM
    tuning: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": NUM_VIRTUAL_TOKENS, "dtype": "float32"}
    with swarm_of(options) as link, closing(auto.from_pretrained(options.model, join=link, **tuning)) as model:
        if options.load is not None:
            model.swarm_prompts.load_state_dict(load_file(options.load))
            show({"now": chat.examine(model, NUM_ANSWERS)})
        else:
            before = chat.examine(model, NUM_ANSWERS)
            losses = train(model, lambda: chat.chosen(BATCH_SIZE), options.steps, LEARNING_RATE)
            show({"before": before, "after": chat.examine(model, NUM_ANSWERS)})
            save_file(model.swarm_prompts.state_dict(), options.output)
            console.print(f"The prompts are in {options.output}; loss of the last step: {losses[-1]:.3f}")
            plot({"deep prompts": losses}, options.plot, "A personal chatbot")
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
            output = model.generate(
                inputs["input_ids"],
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=chat.tokenizer.eos_token_id,
            )
            answer = chat.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            console.print("[bold]Bot:[/bold]", " ".join(answer.split()))
            said = "" if answer.endswith(end) else end


if __name__ == "__main__":
    main()
