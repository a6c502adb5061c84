"""How fast does a batch go forward (no cache, no gradients)? The swarm against the local model, same weights.

python benchmarks/forward.py --shape 1.1B --servers 3
"""

from __future__ import annotations

import torch
from common import alternate, local_and_swarm, parse_setting, report


def main() -> None:
    setting = parse_setting(__doc__ or "", batch_size=8, length=128)
    ids = torch.randint(0, 32000, (setting.batch_size, setting.length))
    with local_and_swarm(setting) as (local, remote):

        def run(model) -> int:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                model(ids, use_cache=False)
            return ids.numel()

        rates = alternate(setting, lambda: run(local), lambda: run(remote))
        with torch.no_grad():
            error = (local(ids).logits - remote(ids, use_cache=False).logits).abs().max().item()
    report("forward", setting, rates, max_logit_error=error)


if __name__ == "__main__":
    main()
