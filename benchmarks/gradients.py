"""What do 8 bits per element on the wire save in training, and what do they cost in loss?

Trains LoRA adapters of the embedded model on what Python documents, over two servers in this process, three times from
the same beginning and with the same batches: everything as it is, gradients of hidden states with 8 bits, and hidden
states as well. Counted are the bytes of all tensors in Forward and Backward, both ways; adapters travel as they are.

python benchmarks/gradients.py --steps 40
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import print_plain, say
from peft import LoraConfig, get_peft_model

import swarm.client.compute
import swarm.server.service
from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.codec import Packed
from swarm.link import JoinLink
from swarm.server import LocalSwarm

KINDS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "int8 gradients": {"gradient_compression": "int8"},
    "int8 hidden states and gradients": {"compression": "int8"},
}
BATCH_SIZE, LEARNING_RATE, NUM_HELD_OUT = 8, 5e-3, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    with LocalSwarm(EMBEDDED_MODEL, ranges=[(0, 3), (3, 6)], dtype="float32", in_process=True) as local:
        rows = [train(local.link, name, arguments.steps) for name in KINDS]
    exact = rows[0]
    for row in rows:
        row["loss_ratio"] = row["held_out"] / exact["held_out"]
        row["bytes_ratio"] = row["num_bytes"] / exact["num_bytes"]
        row["max_loss_difference"] = max(
            abs(one - other) for one, other in zip(row["losses"], exact["losses"], strict=True)
        )
        say({name: value for name, value in row.items() if name != "losses"})
    print_plain("gradients", steps=arguments.steps, batch_size=BATCH_SIZE, rows=rows)


def train(link: str, name: str, num_steps: int) -> dict[str, Any]:
    """The losses of a training, what it reached and how much it sent and got."""
    from sentences import documented_names
    from tuning import Chat, some, trained

    torch.manual_seed(0)
    chat = Chat(EMBEDDED_MODEL, *documented_names(NUM_HELD_OUT))
    config = ClientConfig(initial_peers=JoinLink.parse(link).initial_peers, **KINDS[name])
    auto = AutoDistributedModelForCausalLM
    with closing(auto.from_pretrained(EMBEDDED_MODEL, client_config=config, dtype="float32")) as base:
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
        losses = []
        with counted() as sizes:
            for _ in range(num_steps):
                loss = model(**chat.batch(some(chat.training, BATCH_SIZE)), use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        held_out = chat.loss(model)
    return {"kind": name, "losses": losses, "held_out": held_out, "num_bytes": sum(sizes)}


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of what is packed meanwhile."""
    sizes: list[int] = []
    pack = swarm.client.compute.pack

    def counting(*tensors: torch.Tensor | None, raw: Sequence[torch.Tensor] = (), **kwargs: Any) -> Packed:
        packed = pack(*tensors, raw=raw, **kwargs)
        sizes.extend(spec.num_bytes for spec in packed.specs[: len(tensors)] if spec is not None)
        return packed

    users = (swarm.client.compute, swarm.server.service)
    for user in users:
        user.pack = counting  # type: ignore[attr-defined]
    try:
        yield sizes
    finally:
        for user in users:
            user.pack = pack  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
