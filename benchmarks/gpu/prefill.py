"""How near to the arithmetic rate of a GPU does a prefill come?

    python benchmarks/gpu/prefill.py --lengths 512,2048

The reference is the product of two large matrices of the same dtype, measured in the same run. Counted are the
multiplications of the blocks' matrices and of causal attention.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from execution import (
    SHAPES,
    matrix_flops_per_s,
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

from swarm.server.hardware import pass_tokens


def main() -> None:
    parser = new_gpu_parser(__doc__ or "", executions="modules")
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--chunk", type=int, default=pass_tokens("cuda"), help="tokens of one step")
    setting, arguments = read_setting("gpu/prefill", parser)
    matrix_rate = matrix_flops_per_s(setting)
    span = random_span(setting)
    shape = SHAPES[setting.shape]
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    heads = 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"]) * head_dim
    matrix_numbers = setting.num_blocks * shape["hidden_size"] * (heads + 3 * shape["intermediate_size"])
    rows = []
    for execution, text in itertools.product(setting.executions, arguments.lengths.split(",")):
        length = int(text)
        x_BLD = torch.randn(1, length, span.hidden_size).to(span.dtype)
        sequences = open_sequences(execution, span, 1, length)

        def prefill(sequences=sequences, x_BLD=x_BLD) -> None:  # type: ignore[no-untyped-def]
            sequences.clear()
            for part_BLD in x_BLD.split(arguments.chunk, dim=1):
                sequences.step(part_BLD)

        times_s = sample_s(setting, prefill)
        flops = 2 * matrix_numbers + 2 * length * span.hidden_size * setting.num_blocks  # a token, on average
        row: dict[str, Any] = {"length": length, "execution": execution, "used": sequences.used}
        row["tokens_per_s"] = summary([length / seconds for seconds in times_s])
        flops_per_s = flops * row["tokens_per_s"]["median"]
        rows.append(
            row | {"tflop_per_s": rounded(flops_per_s / 1e12), "of_matrix_rate": rounded(flops_per_s / matrix_rate)}
        )
        say(str(row))
    print_gpu_result(
        "gpu/prefill",
        setting,
        chunk=arguments.chunk,
        matrix_tflop_per_s=rounded(matrix_rate / 1e12),
        rows=rows,
    )


if __name__ == "__main__":
    main()
