"""`swarm generate`: continue a text over a swarm."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import AllowOption, BlockOption, JoinOption, TrustOption, need_join


def generate_command(
    model: Annotated[str, typer.Argument(help="Hub repository or local directory; the model that the swarm serves.")],
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    join: JoinOption = "",
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add at most.", min=1)] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="For --sample.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="For --sample.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="For --sample.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter that servers host, by its name.", show_default=False)
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub token.", show_default=False)] = None,
    quantization: Annotated[
        str, typer.Option(help="Keep the head, which runs here, in fewer bits: int8 or int4. Faster, not exact.")
    ] = "none",
    allow: AllowOption = None,
    block: BlockOption = None,
    trust: TrustOption = None,
) -> None:
    """Continue a text, printing it as it comes.

    Example: swarm generate Qwen/Qwen3-8B "Once upon a time" --join swarm://…
    """
    need_join(join)
    import torch
    import transformers

    from swarm.client import AutoDistributedModelForCausalLM

    distributed = AutoDistributedModelForCausalLM.from_pretrained(
        model,
        join=join,
        revision=revision,
        token=token,
        quantization=quantization,
        active_adapter=adapter,
        allowed_servers=allow or None,
        blocked_servers=block or (),
        trusted_servers=trust or None,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision, token=token)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if sample else {"do_sample": False}
    try:
        encoded = tokenizer(text, return_tensors="pt")
        distributed.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    finally:
        distributed.close()
