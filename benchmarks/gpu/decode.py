"""How near to the limits of a GPU does decoding come, for one person and for many?

    python benchmarks/gpu/decode.py --batch-sizes 1,8,64

A step of one sequence has to read all weights and its cache once, so that the memory's bandwidth, measured in the same
run, limits it. A step of many reads the weights no more often: the reference of larger batches is the batch of one.
"""

from __future__ import annotations

import torch
from execution import (
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
)

PREFILL_TOKENS = 2048
"""Tokens of all sequences together in one step while the context is filled."""


def main() -> None:
    parser = new_gpu_parser(__doc__ or "")
    parser.add_argument("--batch-sizes", default="1,8,64")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence before the steps")
    parser.add_argument("--steps", type=int, default=32, help="in each sample")
    setting, arguments = read_setting("gpu/decode", parser)
    bandwidth = bandwidth_bytes_per_s(setting)
    span = random_span(setting)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in span.parameters())
    cache_bytes = arguments.context * kv_layout(span).bytes_per_slot
    rows = []
    for batch_size in (int(text) for text in arguments.batch_sizes.split(",")):
        num_steps = arguments.steps * (setting.num_samples + 1)
        sequences = open_sequences(setting, span, batch_size, arguments.context + num_steps)
        x_BLD = torch.randn(batch_size, arguments.context, span.hidden_size).to(span.dtype)
        for part_BLD in x_BLD.split(max(1, PREFILL_TOKENS // batch_size), dim=1):
            sequences.step(part_BLD)

        def steps(sequences=sequences, x_BLD=x_BLD[:, -1:]) -> None:  # type: ignore[no-untyped-def]
            for _ in range(arguments.steps):
                sequences.step(x_BLD)

        rates = [batch_size * arguments.steps / seconds for seconds in sample_s(setting, steps)]
        limit = batch_size * bandwidth / (weight_bytes + batch_size * cache_bytes)
        rows.append({"batch_size": batch_size, "tokens_per_s": summary(rates), "limit_tokens_per_s": rounded(limit)})
        say(str(rows[-1]))
        del sequences
    for row in rows:
        rate = row["tokens_per_s"]["median"]
        row["of_limit"] = rounded(rate / row["limit_tokens_per_s"])
        row["times_first_row"] = rounded(rate / rows[0]["tokens_per_s"]["median"])
    print_gpu_result(
        "gpu/decode",
        setting,
        context=arguments.context,
        steps=arguments.steps,
        bandwidth_gb_per_s=rounded(bandwidth / 1e9),
        weight_gb=rounded(weight_bytes / 1e9),
        rows=rows,
    )


if __name__ == "__main__":
    main()
