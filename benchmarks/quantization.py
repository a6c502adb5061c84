"""How much faster does one person's text come from servers whose weights are in 8 or 4 bits?

Greedy decoding over three swarms of the same model, in turns: unquantized, int8 and int4, the client's head in as many
bits as the servers' weights (--whole-head: in all of them). The reference beside them is
local `generate` in the unquantized dtype, by torch's own kernels.

python benchmarks/quantization.py --shape 1.1B --length 16
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from typing import Any

import torch
from common import SHAPES, VOCAB_SIZE, Setting, make_model, new_parser, print_result, rounded, say, setting_of

from swarm import AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm

LOCAL = "local"
QUANTIZATIONS = ("none", "int8", "int4")
PROMPT_TOKENS = 16


def open_swarms(setting: Setting, owned: ExitStack, *, whole_head: bool) -> dict[str, Any]:
    """Start a swarm for each quantization; return a client of each, and the local model."""
    directory = owned.enter_context(tempfile.TemporaryDirectory())
    clients: dict[str, Any] = {LOCAL: make_model(setting.shape, setting.dtype, directory)}
    num_blocks = SHAPES[setting.shape]["num_hidden_layers"]
    cuts = [round(index * num_blocks / setting.num_servers) for index in range(setting.num_servers + 1)]
    for quantization in QUANTIZATIONS:
        say(f"starting servers with weights in {quantization if quantization != 'none' else setting.dtype}")
        servers = LocalSwarm(
            directory,
            list(itertools.pairwise(cuts)),
            dtype=setting.dtype,
            quantization=quantization,
            arguments=setting.serve_flags,
        )
        link = owned.enter_context(servers).link
        client = AutoDistributedModelForCausalLM.from_pretrained(
            directory, join=link, dtype=setting.dtype, quantization="none" if whole_head else quantization
        )
        clients[quantization] = owned.enter_context(closing(client))
    return clients


def measure(clients: dict[str, Any], setting: Setting, batch_size: int, length: int) -> dict[str, list[float]]:
    """Tokens per second of each, a sample a turn."""
    ids = torch.randint(0, VOCAB_SIZE, (batch_size, PROMPT_TOKENS))
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for turn in range(setting.num_samples + 1):
        for name, client in clients.items():
            started = time.perf_counter()
            client.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
            rate = batch_size * length / (time.perf_counter() - started)
            if turn:  # the first one opens connections
                rates[name].append(rate)
        say(", ".join(f"{name} {values[-1]:.2f} tokens/s" for name, values in rates.items() if values))
    return rates


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=1)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences that are decoded together")
    parser.add_argument("--length", type=int, default=32, help="tokens of each sample")
    parser.add_argument("--whole-head", action="store_true", help="leave the client's head as it is")
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    with ExitStack() as owned:
        clients = open_swarms(setting, owned, whole_head=arguments.whole_head)
        rates = measure(clients, setting, arguments.batch_size, arguments.length)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    pairs = {
        name: [fast / slow for fast, slow in zip(rates[name], rates["none"], strict=True)] for name in ("int8", "int4")
    }
    print_result(
        "quantization",
        setting,
        batch_size=arguments.batch_size,
        length=arguments.length,
        whole_head=arguments.whole_head,
        tokens_per_s={name: rounded(median) for name, median in medians.items()},
        ratio={name: rounded(medians[name] / medians["none"]) for name in pairs},
        ratio_to_local={name: rounded(medians[name] / medians[LOCAL]) for name in QUANTIZATIONS},
        ratio_min_max={name: [rounded(min(values)), rounded(max(values))] for name, values in pairs.items()},
        samples={name: [rounded(rate) for rate in values] for name, values in rates.items()},
    )


if __name__ == "__main__":
    main()
