"""How near to the arithmetic rate of a GPU does a prefill come?

    python benchmarks/gpu/prefill.py --lengths 512,2048

The reference is the product of two large matrices of the same dtype, measured in the same run. Counted are the
multiplications of the blocks' matrices and of causal attention.
"""

from __future__ import annotations

import torch
from execution import (
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


def main() -> None:
    parser = new_gpu_parser(__doc__ or "")
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step, as the server cuts a prefill")
    setting, arguments = read_setting("gpu/prefill", parser)
    matrix_rate = matrix_flops_per_s(setting)
    span = random_span(setting)
    matrix_numbers = sum(parameter.numel() for parameter in span.parameters() if parameter.dim() == 2)
    rows = []
    for length in (int(text) for text in arguments.lengths.split(",")):
        x_BLD = torch.randn(1, length, span.hidden_size).to(span.dtype)

        sequences = open_sequences(setting, span, 1, length)

        def prefill(sequences=sequences, x_BLD=x_BLD) -> None:  # type: ignore[no-untyped-def]
            sequences.clear()
            for part_BLD in x_BLD.split(arguments.chunk, dim=1):
                sequences.step(part_BLD)

        times_s = sample_s(setting, prefill)
        flops = 2 * matrix_numbers * length + 2 * length**2 * span.hidden_size * setting.num_blocks
        rates = summary([length / seconds for seconds in times_s])
        row = {"length": length, "tokens_per_s": rates, "tflop_per_s": rounded(flops / length * rates["median"] / 1e12)}
        row["of_matrix_rate"] = rounded(flops / length * rates["median"] / matrix_rate)
        rows.append(row)
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
