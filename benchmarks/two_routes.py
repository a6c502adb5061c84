"""How much faster does a batch go forward and backward over two routes than over one? Each route has a core of its own.

    python benchmarks/two_routes.py --shape 124M --dtype float32

Two servers hold all blocks; the client's micro-batches go to one of them, or to both at the same time. All linear
layers of the blocks have LoRA, which changes before each sample. The reference is one route; embeddings and head take
no part.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from common import SHAPES, BatchSetting, alternate, make_model, new_parser, print_result, rounded, setting_of

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.model.adapters import BlockAdapter, Lora
from swarm.server import LocalSwarm

RANK, SCALING = 8, 2.0


def main() -> None:
    parser = new_parser(__doc__ or "", num_samples=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2, help="sequences in a micro-batch")
    arguments = parser.parse_args()
    common = setting_of(arguments)
    setting = BatchSetting(
        shape=common.shape,
        num_servers=2,
        num_samples=common.num_samples,
        dtype=common.dtype,
        label=common.label,
        serve_flags=("--threads", "1", *common.serve_flags),
        batch_size=arguments.batch_size,
        length=arguments.length,
    )
    with servers_on_cores(setting) as (directory, links), ExitStack() as owned:
        peer_ids = [JoinLink.parse(link).initial_peers[0].rpartition("/")[2] for link in links]
        models = []
        for allowed in (peer_ids[:1], peer_ids):
            config = ClientConfig(
                initial_peers=JoinLink.parse(links[0]).initial_peers,
                micro_batch_tokens=arguments.rows * setting.length,
                allowed_servers=allowed,
            )
            model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=links[0], client_config=config)
            owned.callback(model.close)
            models.append(model)
        one, two = models
        rates = alternate(setting, lambda: train(setting, one), lambda: train(setting, two))
    pairs = [fast / slow for fast, slow in zip(rates["swarm"], rates["local"], strict=True)]
    print_result(
        "two_routes",
        setting,
        rows=arguments.rows,
        rank=RANK,
        one_route_tokens_per_s=rounded(statistics.median(rates["local"])),
        two_routes_tokens_per_s=rounded(statistics.median(rates["swarm"])),
        ratio=rounded(statistics.median(rates["swarm"]) / statistics.median(rates["local"])),
        ratio_min_max=[rounded(min(pairs)), rounded(max(pairs))],
    )


@contextmanager
def servers_on_cores(setting: BatchSetting) -> Iterator[tuple[str, list[str]]]:
    """Yield the directory of a model, and the links of two servers of all its blocks, each on one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two routes with a core each need two cores")
    whole = (0, SHAPES[setting.shape]["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as directory, ExitStack() as owned:
        make_model(setting.shape, setting.dtype, directory)
        links: list[str] = []
        for core in cores[:2]:
            os.sched_setaffinity(0, {core})  # which its process inherits
            try:
                servers = LocalSwarm(
                    directory,
                    [whole],
                    dtype=setting.dtype,
                    arguments=setting.serve_flags,
                    join=links[0] if links else None,
                )
                owned.enter_context(servers)
            finally:
                os.sched_setaffinity(0, cores)
            links.append(servers.link)
        yield directory, links


def train(setting: BatchSetting, model: Any) -> int:
    """One batch forward and backward, with adapters that no server has seen; return its tokens."""
    x_BLD = torch.randn(setting.batch_size, setting.length, SHAPES[setting.shape]["hidden_size"], requires_grad=True)
    model.remote_blocks(x_BLD, adapters=new_adapters(setting.shape)).sum().backward()
    return setting.batch_size * setting.length


def new_adapters(shape: str) -> list[BlockAdapter]:
    """LoRA on all linear layers of all blocks."""
    sizes = SHAPES[shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    widths = {f"self_attn.{name}_proj": (hidden, {"k": keys, "v": keys}.get(name, hidden)) for name in "qkvo"}
    widths |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}

    def lora(target: str, num_in: int, num_out: int) -> Lora:
        a_RI, b_OR = torch.randn(RANK, num_in) * 0.01, torch.randn(num_out, RANK) * 0.01
        return Lora(target, a_RI.requires_grad_(), b_OR.requires_grad_(), SCALING)

    return [
        BlockAdapter([lora(target, *width) for target, width in widths.items()])
        for _ in range(sizes["num_hidden_layers"])
    ]


if __name__ == "__main__":
    main()
