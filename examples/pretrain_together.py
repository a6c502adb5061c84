"""Train a small language model from nothing with several peers, each on text of its own.

    python examples/pretrain_together.py                                all of it on this computer, three minutes
    python examples/pretrain_together.py --listen /ip4/0.0.0.0/tcp/0    the first peer; it says how others join
    python examples/pretrain_together.py --listen … --peer /ip4/…       another one; --share says which text it takes

Every peer has the whole model; hivemind averages their gradients, so the more peers, the sooner an update is made. The
text is Python's own documentation of the language, which comes with Python. Without --listen, three peers train, then a
single one with all the text, and their losses are compared.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from contextlib import ExitStack

import hivemind
import torch
from hivemind.utils import get_dht_time
from peers import Peer, end_on_sigterm, follow, new_optimizer, say
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from tuning import console, new_parser, parse, plot, show

from swarm import EMBEDDED_MODEL

NUM_SHARES = 3
SAMPLES_PER_UPDATE, BATCH_SIZE, LENGTH = 48, 8, 64
"""An update takes so many sequences of all peers together, a step so many of one; the tokens of each."""

LEARNING_RATE = 3e-3
HELD_OUT = 16
"""Every so manieth sequence is not learned from."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__ or "", steps=40, output="pretrained")
    parser.add_argument("--listen", help="be a peer, and let others dial it here")
    parser.add_argument("--peer", action="append", default=[], help="where a peer of the run can be dialled")
    parser.add_argument("--share", type=int, default=0, help=f"which part of the text, of {NUM_SHARES}; -1: all")
    parser.add_argument("--wait-for", type=int, default=1, help="begin when so many peers are there (default: 1)")
    options = parse(parser, arguments)
    if options.listen is not None:
        take_part(options)
    else:
        demonstrate(options)


def take_part(options: argparse.Namespace) -> None:
    """Train as one peer until the run has made its updates."""
    text = sequences()
    held_out = text[::HELD_OUT]
    rest = [each for number, each in enumerate(text) if number % HELD_OUT]
    mine = rest if options.share < 0 else rest[options.share :: NUM_SHARES]
    torch.manual_seed(0)  # all peers begin with the same model
    model = new_model()
    before = loss_on(model, held_out)
    torch.manual_seed(options.seed + options.share)
    dht = hivemind.DHT(start=True, host_maddrs=[options.listen], initial_peers=options.peer or None)
    say({"addresses": [str(address) for address in dht.get_visible_maddrs()]})
    wait_for_peers(dht, options.wait_for)
    optimizer = new_optimizer(
        dht, "pretraining", list(model.parameters()), samples_per_update=SAMPLES_PER_UPDATE,
        learning_rate=LEARNING_RATE, num_updates=options.steps,
    )  # fmt: skip

    def next_batch() -> dict[str, torch.Tensor]:
        ids = torch.stack([mine[number] for number in torch.randint(len(mine), (BATCH_SIZE,)).tolist()])
        return {"input_ids": ids, "labels": ids}

    num_samples = follow(model, optimizer, next_batch, options.steps)
    optimizer.shutdown()
    dht.shutdown()
    model.save_pretrained(options.output)
    say({"before": before, "after": loss_on(model, held_out), "num_samples": num_samples})


def wait_for_peers(dht: hivemind.DHT, num_peers: int) -> None:
    """Wait until so many are there: alone, the first would have made its updates before the others are ready."""
    dht.store("here", subkey=str(dht.peer_id), value=True, expiration_time=get_dht_time() + 3600)
    while len((dht.get("here", latest=True) or ({},))[0]) < num_peers:
        time.sleep(0.5)


def sequences() -> list[torch.Tensor]:
    """Python's documentation of the language, in pieces of LENGTH tokens."""
    topics = importlib.import_module("pydoc_data.topics").topics
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    end = tokenizer.eos_token
    text = end.join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return list(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))


def new_model() -> LlamaForCausalLM:
    """A Llama of 0.6 million parameters that knows nothing."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, text: Sequence[torch.Tensor]) -> float:
    """Nats per token."""
    ids = torch.stack(list(text))
    return float(model.eval()(input_ids=ids, labels=ids, use_cache=False).loss)


def demonstrate(options: argparse.Namespace) -> None:
    """Three peers, then a single one."""
    with ExitStack() as owned:

        def start(name: str, share: int, initial_peers: Sequence[str]) -> Peer:
            flags = ["--listen", "/ip4/127.0.0.1/tcp/0", "--share", str(share)]
            flags += ["--wait-for", str(1 if share < 0 else NUM_SHARES)]
            flags += ["--steps", str(options.steps), "--seed", str(options.seed)]
            flags += ["--output", str(options.output / name)]
            peer = Peer(name, __file__, [*flags, *(flag for each in initial_peers for flag in ("--peer", each))])
            owned.callback(peer.kill)
            return peer

        console.print("Three peers train together.")
        first = start("peer-0", 0, ())
        addresses = first.wait_for(lambda words: "addresses" in words)["addresses"]
        others = [start(f"peer-{share}", share, addresses) for share in range(1, NUM_SHARES)]
        for peer in (first, *others):
            peer.wait_done()
        console.print("Now a single peer, with all the text.")
        alone = start("alone", -1, ())
        alone.wait_done()
    losses = {
        "before": first.outcome["before"],
        "together": first.outcome["after"],
        "one peer with all the text": alone.outcome["after"],
    }
    show({name: {"loss on held-out text": f"{loss:.3f}"} for name, loss in losses.items()})
    plot({"together": first.losses, "alone": alone.losses}, options, "Trained from nothing, together")
    say({"peers": [each.said for each in (first, *others)], "alone": alone.said})


if __name__ == "__main__":
    end_on_sigterm()
    main()
