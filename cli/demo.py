"""`swarm demo`: a whole swarm on this computer, in five parts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from swarm.errors import BadRequest
from swarm.link import JoinLink

from .common import console, errors
from .printer import TokenPrinter

PROMPT = "The function returns"
SENTENCE = "A quick brown fox did not jump over the lazy dog"
SENTENCE_START = "A quick brown fox"
NUM_NEW_TOKENS = 60
MAX_TRAINING_STEPS = 100
LOSS_WANTED = 0.1
NUM_TIMED_RUNS = 3
SMALL_HIDDEN_SIZE = 512
"""Below this, one thread is faster than several, which would mostly wait for one another."""
CLEANUP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Stage:
    """What all parts work with."""

    name: str
    local: Any
    model: Any
    tokenizer: Any


def demo_command(
    model: Annotated[
        str, typer.Option(help="Hub repository or local directory; default: the model in this package.")
    ] = "",
) -> None:
    """Show a swarm at work on this computer: three servers, text, fine-tuning, and the loss of a server.

    Example: swarm demo
    """
    with _ending_cleanly():
        if not model:
            from swarm import EMBEDDED_MODEL

            model = EMBEDDED_MODEL
        _run(model)


def _run(name: str) -> None:
    with console.status("Loading PyTorch and Transformers"):
        import torch
        import transformers

        from swarm.client import AutoDistributedConfig, AutoDistributedModelForCausalLM
        from swarm.model.anatomy import anatomy_of
        from swarm.server import LocalSwarm

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        anatomy = anatomy_of(AutoDistributedConfig.from_pretrained(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    _heading(1, "Three servers, each with a third of the model")
    arguments = []
    if anatomy.hidden_size < SMALL_HIDDEN_SIZE:
        arguments = ["--threads", "1"]
        torch.set_num_threads(1)
    with ExitStack() as owned:
        with console.status("Starting the servers"):
            # float32, so that texts can be compared token by token
            local = LocalSwarm(name, ranges=_thirds(anatomy.num_blocks), dtype="float32", arguments=arguments)
            owned.enter_context(local)
        with console.status("Joining the swarm"):
            model = AutoDistributedModelForCausalLM.from_pretrained(name, join=local.link, dtype="float32")
        owned.callback(model.close)
        _five_parts(_Stage(name, local, model, tokenizer))


def _five_parts(stage: _Stage) -> None:
    _show_servers(stage)
    _heading(2, "Text, token by token")
    console.print(f"[bold]{PROMPT}[/]", end="")
    undisturbed = _generate(stage, PROMPT, NUM_NEW_TOKENS)
    with console.status("Timing the swarm, then the whole model in this process"):
        rates = _tokens_per_s(stage)
    _heading(3, f"Fine-tuning on “{SENTENCE}”")
    _fine_tune(stage)
    _heading(4, "A server dies while it is needed")
    recovery_s = _lose_a_server(stage, undisturbed)
    _heading(5, "In numbers")
    _show_numbers(*rates, recovery_s)


def _show_servers(stage: _Stage) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("server", "blocks", "process", "peer"):
        table.add_column(column, style="cyan" if column == "blocks" else None)
    for number, server in enumerate(stage.local.servers, 1):
        table.add_row(str(number), str(server.blocks), str(server.process.pid), _peer_id(server)[-8:])
    console.print(table)
    weights = sum(parameter.numel() for parameter in stage.model.parameters() if not parameter.is_meta)
    console.print(f"This process holds the embeddings and the head ({weights / 1e6:.1f} M weights), but no block.")


def _generate(
    stage: _Stage, prompt: str, num_tokens: int, printer: TokenPrinter | None = None, model: Any = None, **options: Any
) -> TokenPrinter:
    """Continue `prompt` greedily by exactly `num_tokens`, on the swarm or on `model`."""
    printer = printer or TokenPrinter(stage.tokenizer)
    (model or stage.model).generate(
        **_encode(stage, prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=stage.tokenizer.pad_token_id or stage.tokenizer.eos_token_id,
        streamer=printer,
        **options,
    )
    return printer


def _encode(stage: _Stage, text: str) -> dict[str, Any]:
    encoded = stage.tokenizer(text, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _fine_tune(stage: _Stage) -> None:
    import torch

    parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    batch = _encode(stage, SENTENCE)
    for step in range(MAX_TRAINING_STEPS):
        loss = stage.model(**batch, labels=batch["input_ids"], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = loss.item() < LOSS_WANTED or step == MAX_TRAINING_STEPS - 1
        if step % 5 == 0 or done:
            console.print(f"  step {step:3}  loss [yellow]{loss.item():6.3f}[/] " + "▪" * round(4 * loss.item()))
        if done:
            break
    num_tokens = batch["input_ids"].shape[1] - _encode(stage, SENTENCE_START)["input_ids"].shape[1]
    console.print(f"[bold]{SENTENCE_START}[/]", end="")
    _generate(stage, SENTENCE_START, num_tokens)
    with torch.no_grad():  # the parts that follow compare with the model as it was
        for parameter, saved in zip(parameters, before, strict=True):
            parameter.copy_(saved)


def _lose_a_server(stage: _Stage, undisturbed: TokenPrinter) -> float:
    """Kill the middle server of a running generation; return how long the text paused."""
    local = stage.local
    middle = local.servers[1].blocks
    with console.status("Starting a second server for the middle blocks"):
        local.add((middle.start, middle.end))
    console.print(f"Blocks {middle} are now served twice. The same text again:")
    console.print(f"[bold]{PROMPT}[/]", end="")
    killed_after = NUM_NEW_TOKENS // 3

    def on_token(number: int) -> None:
        if number == killed_after:
            peer_id = next(hop.peer_id for hop in session.route if hop.blocks == middle)
            server = next(server for server in local.servers if _peer_id(server) == peer_id)
            server.kill()
            console.print(f" [bold red]✗ kill -9 {server.process.pid}[/] ", end="", highlight=False)

    printer = TokenPrinter(stage.tokenizer, on_token=on_token)
    num_prompt_tokens = _encode(stage, PROMPT)["input_ids"].shape[1]
    with stage.model.inference_session(max_length=num_prompt_tokens + NUM_NEW_TOKENS) as session:
        _generate(stage, PROMPT, NUM_NEW_TOKENS, printer)
    gaps_s = [after - before for before, after in pairwise(printer.times_s)]
    recovery_s = gaps_s[killed_after - 1]
    if printer.token_ids != undisturbed.token_ids:
        console.print("[bold red]The text differs from the undisturbed one: this is a bug.[/]")
        raise typer.Exit(1)
    console.print(
        f"[green]✓[/] The same text, with a pause of [bold]{recovery_s:.2f} s[/]; "
        f"a token usually takes {median(gaps_s):.3f} s.",
        highlight=False,
    )
    return recovery_s


def _tokens_per_s(stage: _Stage) -> tuple[float, float]:
    """Decode with the swarm, and with the same model in this process; medians."""
    import transformers

    from swarm.server.hardware import choose_device

    def rate(model: Any) -> float:
        printers = [TokenPrinter(stage.tokenizer, style=None) for _ in range(NUM_TIMED_RUNS)]
        return median(_generate(stage, PROMPT, NUM_NEW_TOKENS, printer, model).tokens_per_s for printer in printers)

    whole = transformers.AutoModelForCausalLM.from_pretrained(stage.name, dtype="float32").to(choose_device("auto"))
    return rate(stage.model), rate(whole)


def _show_numbers(swarm_rate: float, local_rate: float, recovery_s: float) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("over the swarm, 3 servers", f"{swarm_rate:.1f} tokens/s", style="bold")
    table.add_row("the same model in this process", f"{local_rate:.1f} tokens/s")
    table.add_row("ratio", f"{swarm_rate / local_rate:.2f}")
    table.add_row("pause when a server was lost", f"{recovery_s:.2f} s")
    console.print(table)


def _thirds(num_blocks: int) -> Sequence[tuple[int, int]]:
    if num_blocks < 3:
        raise BadRequest(
            f"the demo cuts a model into 3 parts, this one has {num_blocks} blocks: choose another --model"
        )
    cuts = [part * num_blocks // 3 for part in range(4)]
    return list(pairwise(cuts))


def _peer_id(server: Any) -> str:
    return JoinLink.parse(server.link).initial_peers[0].rpartition("/")[2]


def _heading(number: int, text: str) -> None:
    console.print(f"\n[bold magenta]{number}[/] [bold]{text}[/]", highlight=False)


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """End the body at the first SIGINT or SIGTERM, in one line and with exit code 130."""

    def on_signal(_number: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # what is left to do takes a moment, and nothing else
        deadline = threading.Timer(CLEANUP_TIMEOUT_S, os._exit, (130,))  # the servers end when we do, however that is
        deadline.daemon = True
        deadline.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        yield
    except KeyboardInterrupt:
        errors.print("\nswarm: interrupted; all servers are stopped")
        raise typer.Exit(130) from None
