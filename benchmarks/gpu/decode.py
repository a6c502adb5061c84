"""How near to the limits of a GPU does decoding come, for one person and for many?

    python benchmarks/gpu/decode.py --batch-sizes 1,64
    python benchmarks/gpu/decode.py --shape 70B --num-blocks 8 --quantization nf4

A step of one sequence has to read all weights and its cache once, so that the memory's bandwidth, measured in the same
run, limits it. A step of many reads the weights no more often: the reference of larger batches is the batch of one.
Each batch is run with recorded passes and without (--executions), and the result says which of the fast ways were found
to work.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from execution import (
    GpuSetting,
    Span,
    bandwidth_bytes_per_s,
    kv_layout,
    new_gpu_parser,
    open_sequences,
    print_gpu_result,
    random_span,
    read_setting,
    rounded,
    sample_s,
    say,
    summary,
    weight_bytes,
)

PREFILL_TOKENS = 2048
"""Tokens of all sequences together in one step while the context is filled."""


def measure(setting: GpuSetting, span: Span, batch_size: int, execution: str, arguments: Namespace) -> dict[str, Any]:
    """The rate of one way to run a batch, in tokens per second."""
    num_steps = arguments.steps * (setting.num_samples + 1)
    sequences = open_sequences(execution, span, batch_size, arguments.context + num_steps)
    x_BLD = torch.randn(batch_size, arguments.context, span.hidden_size).to(span.dtype)
    for part_BLD in x_BLD.split(max(1, PREFILL_TOKENS // batch_size), dim=1):
        sequences.step(part_BLD)

    def steps() -> None:
        for _ in range(arguments.steps):
            sequences.step(x_BLD[:, -1:])

    rates = [batch_size * arguments.steps / seconds for seconds in sample_s(setting, steps)]
    row = {"batch_size": batch_size, "execution": execution, "used": sequences.used, "tokens_per_s": summary(rates)}
    say(str(row))
    return row


def main() -> None:
    parser = new_gpu_parser(__doc__ or "", executions="graphs,modules")
    parser.add_argument("--batch-sizes", default="1,64")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence before the steps")
    parser.add_argument("--steps", type=int, default=32, help="in each sample")
    setting, arguments = read_setting("gpu/decode", parser)
    bandwidth = bandwidth_bytes_per_s(setting)
    span = random_span(setting)
    cache_bytes = arguments.context * kv_layout(span).bytes_per_slot
    rows = []
    for execution in setting.executions:
        first_rate = 0.0
        for batch_size in (int(text) for text in arguments.batch_sizes.split(",")):
            row = measure(setting, span, batch_size, execution, arguments)
            rate = row["tokens_per_s"]["median"]
            first_rate = first_rate or rate
            limit = batch_size * bandwidth / (weight_bytes(span) + batch_size * cache_bytes)
            row |= {"limit_tokens_per_s": rounded(limit), "of_limit": rounded(rate / limit)}
            rows.append(row | {"times_first_row": rounded(rate / first_rate)})
    print_gpu_result(
        "gpu/decode",
        setting,
        context=arguments.context,
        steps=arguments.steps,
        bandwidth_gb_per_s=rounded(bandwidth / 1e9),
        weight_gb=rounded(weight_bytes(span) / 1e9),
        rows=rows,
    )


if __name__ == "__main__":
    main()
