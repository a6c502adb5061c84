"""How fast is forward plus backward? Both sides train the embeddings, norm and head; the blocks are frozen.

    python benchmarks/train_step.py --shape 124M --servers 2
    python benchmarks/train_step.py --shape 124M --servers 2 --serve-flags="--kept-mib 0"

Servers keep the activations of Forward for Backward. Without room for them they compute them again: three passes where
the local model does two.
"""

from __future__ import annotations

import torch
from common import alternate, local_and_swarm, parse_setting, report


def main() -> None:
    setting = parse_setting(__doc__ or "", batch_size=8, length=128)
    ids = torch.randint(0, 32000, (setting.batch_size, setting.length))
    with local_and_swarm(setting) as (local, remote):
        local.model.layers.requires_grad_(False)

        def run(model) -> int:  # type: ignore[no-untyped-def]
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return ids.numel()

        rates = alternate(setting, lambda: run(local), lambda: run(remote))
        difference = (local.model.embed_tokens.weight.grad - remote.model.embed_tokens.weight.grad).abs().max().item()
    report("train_step", setting, rates, max_gradient_error=difference)


if __name__ == "__main__":
    main()
