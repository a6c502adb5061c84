"""How long until the first token of a long prompt comes? Over the swarm against local `generate`, same weights.

python benchmarks/prefill.py --lengths 128,512,2048 --dtype float32
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from common import local_and_swarm, new_parser, print_result, rounded, say, setting_of
from tasks import generate_here, random_prompts


def main() -> None:
    parser = new_parser(__doc__ or "", num_samples=3)
    parser.add_argument("--lengths", default="128,256,512,1024,2048", help="tokens of the prompts")
    parser.add_argument("--limit-s", type=float, default=120.0, help="no new sample of a length is begun after this")
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    rows = []
    with local_and_swarm(setting) as (local, remote):
        for length in (int(text) for text in arguments.lengths.split(",")):

            def first_token_s(model: object, sample: int, length: int = length) -> float:
                return generate_here(model, random_prompts(1, length, sample)[0], 1).first_token_s

            pairs = _pairs(
                lambda sample: first_token_s(local, sample),
                lambda sample: first_token_s(remote, sample),
                setting.num_samples,
                arguments.limit_s,
            )
            say(f"{length} tokens: {pairs}")
            rows.append({"length": length} | _summary(length, pairs))
    print_result("prefill", setting, rows=rows)


def _pairs(
    local: Callable[[int], float], remote: Callable[[int], float], num_samples: int, limit_s: float
) -> list[tuple[float, float]]:
    """Measure both in turns, after each has run once."""
    local(0), remote(0)
    started_s = time.monotonic()
    pairs = []
    for sample in range(1, num_samples + 1):
        pairs.append((local(sample), remote(sample)))
        if time.monotonic() - started_s > limit_s:
            break
    return pairs


def _summary(length: int, pairs: list[tuple[float, float]]) -> dict[str, object]:
    local_s, swarm_s = (statistics.median(times_s) for times_s in zip(*pairs, strict=True))
    ratios = [swarm / local for local, swarm in pairs]
    return {
        "local_first_token_s": rounded(local_s),
        "swarm_first_token_s": rounded(swarm_s),
        "time_ratio": rounded(swarm_s / local_s),
        "time_ratio_min_max": [rounded(min(ratios)), rounded(max(ratios))],
        "swarm_tokens_per_s": rounded(length / swarm_s),
        "samples": {
            "local": [rounded(local) for local, _ in pairs],
            "swarm": [rounded(swarm) for _, swarm in pairs],
        },
    }


if __name__ == "__main__":
    main()
