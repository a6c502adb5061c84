"""Train one LoRA adapter with several peers, each on data of its own, through blocks that other people serve.

    python examples/train_together.py                                   all of it on this computer, three minutes
    python examples/train_together.py --join swarm://v1.… --run NAME    one peer; others with the same NAME join it

The adapter learns to say what the functions of Python's library do. The peers find one another through the swarm, and
average their gradients with hivemind; the data stays where it is. They may come and go: without --join, three peers
begin, one is killed and another one takes its data, and their loss is compared with that of a single peer with all the
data. Over several machines, add --listen /ip4/0.0.0.0/tcp/0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing

import torch
from peers import Peer, end_on_sigterm, follow, new_optimizer, say
from peft import LoraConfig, get_peft_model
from sentences import documented_names
from tuning import Chat, console, new_parser, parse, plot, show, some, swarm_of, trained

from swarm import AutoDistributedModelForCausalLM
from swarm.client import open_training_dht

NUM_SHARES = 3
"""Parts of the data, one for each peer."""

SAMPLES_PER_UPDATE, BATCH_SIZE = 48, 4
"""An update takes so many exchanges of all peers together, and a step so many of one."""

LEARNING_RATE = 5e-3
NUM_HELD_OUT = 60


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__ or "", steps=20, output="together-adapter")
    parser.add_argument("--run", help="name of the run, for those who train together; needs --join")
    parser.add_argument("--share", type=int, default=0, help=f"which part of the data, of {NUM_SHARES}; -1: all")
    parser.add_argument("--listen", default="/ip4/127.0.0.1/tcp/0", help="where other peers can dial this one")
    options = parse(parser, arguments)
    if (options.join is None) != (options.run is None):
        parser.error("a peer needs both --join and --run; leave both out to try it on this computer")
    if options.run is not None:
        take_part(options)
    else:
        demonstrate(options)


def take_part(options: argparse.Namespace) -> None:
    """Train as one peer until the run has made its updates."""
    chat = Chat(options.model, *documented_names(NUM_HELD_OUT))
    mine = chat.training if options.share < 0 else chat.training[options.share :: NUM_SHARES]
    torch.manual_seed(0)  # all peers begin with the same adapter
    base = AutoDistributedModelForCausalLM.from_pretrained(options.model, join=options.join, dtype="float32")
    with closing(base):
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
        before = chat.loss(model)
        torch.manual_seed(options.seed + options.share)
        with open_training_dht(model, options.run, host_maddrs=[options.listen]) as dht:
            optimizer = new_optimizer(
                dht, options.run, trained(model), samples_per_update=SAMPLES_PER_UPDATE, learning_rate=LEARNING_RATE,
                num_updates=options.steps,
            )  # fmt: skip
            try:
                num_samples = follow(model, optimizer, lambda: chat.batch(some(mine, BATCH_SIZE)), options.steps)
            finally:
                optimizer.shutdown()
        after = chat.loss(model)
        model.save_pretrained(options.output)
    say({"before": before, "after": after, "num_samples": num_samples})


def demonstrate(options: argparse.Namespace) -> None:
    """Three peers, one of which is killed and replaced; then a single one."""
    with ExitStack() as owned:
        options.join = owned.enter_context(swarm_of(options))

        def start(name: str, run: str, share: int) -> Peer:
            flags = ["--join", options.join, "--run", run, "--share", share, "--model", options.model]
            flags += ["--steps", options.steps, "--seed", options.seed, "--output", options.output / name]
            peer = Peer(name, __file__, [str(flag) for flag in flags])
            owned.callback(peer.kill)
            return peer

        console.print("Three peers train together. Another one will come for one of them, which will be killed.")
        first, second, third = (start(f"peer-{share}", "together", share) for share in range(NUM_SHARES))
        first.wait_update(1)
        fourth = start("peer-3", "together", 1)
        first.wait_update(max(1, options.steps // 4))
        second.kill()
        console.print("peer-1 was killed, peer-3 comes in its place.")
        for peer in (first, third, fourth):
            peer.wait_done()
        if 1 in fourth.losses:
            raise SystemExit("peer-3 came when the others had ended: give more --steps on so busy a computer")
        console.print("Now a single peer, with all the data.")
        alone = start("alone", "alone", -1)
        alone.wait_done()
    losses = {
        "before": first.outcome["before"],
        "together": first.outcome["after"],
        "one peer with all the data": alone.outcome["after"],
    }
    show({name: {"loss on new questions": f"{loss:.3f}"} for name, loss in losses.items()})
    plot({"together": first.losses, "alone": alone.losses}, options, "LoRA trained together")
    say({"peers": [each.said for each in (first, second, third, fourth)], "alone": alone.said})


if __name__ == "__main__":
    end_on_sigterm()
    main()
