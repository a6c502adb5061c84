"""How fast is forward plus backward with LoRA on all linear layers of the blocks? The local model is PEFT's.

    python benchmarks/adapters.py --shape 124M --servers 2

Nothing else is trained. The adapters change before each sample, as an optimizer would change them, so each sample sends
them to the servers once.
"""

from __future__ import annotations

import peft
import torch
from common import alternate, local_and_swarm, parse_setting, report
from torch import Tensor

from swarm.model.adapters import BlockAdapter, Lora

RANK, SCALING = 8, 2.0


def main() -> None:
    setting = parse_setting(__doc__ or "", batch_size=8, length=128)
    ids = torch.randint(0, 32000, (setting.batch_size, setting.length))
    with local_and_swarm(setting) as (whole, remote):
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules="all-linear", init_lora_weights=False)
        local = peft.get_peft_model(whole, lora)
        names = [name for name, parameter in local.named_parameters() if parameter.requires_grad]
        ours = {name: local.get_parameter(name).detach().clone().requires_grad_() for name in names}
        remote.requires_grad_(False)
        remote._swarm.adapters = lambda: adapters_of(ours, len(whole.model.layers))

        def run(model, tensors: list[Tensor]) -> int:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                for tensor in tensors:
                    tensor.mul_(0.9999)
                    tensor.grad = None
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return ids.numel()

        theirs = [local.get_parameter(name) for name in names]
        rates = alternate(setting, lambda: run(local, theirs), lambda: run(remote, list(ours.values())))
        difference = max(
            float((one.grad - other.grad).abs().max() / other.grad.abs().max())
            for one, other in zip(ours.values(), theirs, strict=True)
        )
    report("adapters", setting, rates, rank=RANK, max_relative_gradient_error=difference)


def adapters_of(tensors: dict[str, Tensor], num_blocks: int) -> list[BlockAdapter]:
    """The same LoRA as PEFT's, block by block."""
    changes: list[list[Lora]] = [[] for _ in range(num_blocks)]
    for name, a_RI in tensors.items():
        before, found, _ = name.partition(".lora_A.")
        if found:
            number, _, target = before.partition(".layers.")[2].partition(".")
            changes[int(number)].append(Lora(target, a_RI, tensors[name.replace("lora_A", "lora_B")], SCALING))
    return [BlockAdapter(each) for each in changes]


if __name__ == "__main__":
    main()
