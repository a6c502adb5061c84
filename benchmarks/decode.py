"""How fast does one person's text come? Greedy decoding over the swarm against local `generate`, same weights.

python benchmarks/decode.py --shape 1.1B --servers 3
"""

from __future__ import annotations

import torch
from common import alternate, local_and_swarm, parse_setting, report


def main() -> None:
    setting = parse_setting(__doc__ or "", batch_size=1, length=32)
    ids = torch.randint(0, 32000, (setting.batch_size, 16))
    with local_and_swarm(setting) as (local, remote):

        def run(model) -> int:  # type: ignore[no-untyped-def]
            output = model.generate(
                ids, max_new_tokens=setting.length, min_new_tokens=setting.length, do_sample=False, pad_token_id=0
            )
            return int(output.shape[0] * (output.shape[1] - ids.shape[1]))

        rates = alternate(setting, lambda: run(local), lambda: run(remote))
    report("decode", setting, rates)


if __name__ == "__main__":
    main()
