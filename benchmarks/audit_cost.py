"""What do audits cost? Greedy decoding over one swarm by two clients in turns, of which one audits.

python benchmarks/audit_cost.py --shape 124M --copies 2 --tokens 200

The ratio is that of tokens per second with audits to those without, on one machine: whatever the audits make the
servers do, the decoding lacks. `cpu_ratio` is that of tokens per second of processor time, of all processes together,
which others on the machine disturb less. With `--audits 0`, the second client is as the first, and the ratio is noise.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, alternate, make_model, new_parser, print_result, ratios, rounded, setting_of

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.server import LocalSwarm

PROMPT_TOKENS = 16


def main() -> None:
    parser = new_parser(__doc__ or "")
    parser.add_argument("--copies", type=int, default=2, metavar="N", help="servers of each range of blocks")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens of a generation")
    parser.add_argument("--audits", type=float, default=0.05, metavar="SHARE", help="audit_fraction of the client")
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    torch.manual_seed(1)
    num_blocks = SHAPES[setting.shape]["num_hidden_layers"]
    cuts = [round(index * num_blocks / setting.num_servers) for index in range(setting.num_servers + 1)]
    ids = torch.randint(0, 32000, (1, PROMPT_TOKENS))
    with tempfile.TemporaryDirectory() as directory:
        make_model(setting.shape, setting.dtype, directory)
        ranges = list(itertools.pairwise(cuts)) * arguments.copies
        with LocalSwarm(directory, ranges, dtype=setting.dtype, arguments=setting.serve_flags) as servers:
            plain, auditing = (_join(directory, servers, share) for share in (0.0, arguments.audits))

            cpu_s: dict[int, list[float]] = {id(plain): [], id(auditing): []}

            def run(model: Any) -> int:
                length, before_s = arguments.tokens, _cpu_s(servers)
                output = model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)
                cpu_s[id(model)].append(_cpu_s(servers) - before_s)
                return int(output.shape[1] - PROMPT_TOKENS)

            rates = alternate(setting, lambda: run(plain), lambda: run(auditing))
            used_s = [sum(cpu_s[id(model)][1:]) for model in (plain, auditing)]  # the first time was to warm up
            num_audits = auditing._swarm.connection.network.pace.num_audits
            for model in (plain, auditing):
                model.close()
    renamed = ratios(rates)
    results = {
        "plain_tokens_per_s": renamed.pop("local_tokens_per_s"),
        "auditing_tokens_per_s": renamed.pop("swarm_tokens_per_s"),
        "samples": {"plain": renamed["samples"]["local"], "auditing": renamed["samples"]["swarm"]},
    }
    results |= {"cpu_ratio": rounded(used_s[0] / used_s[1]), "num_audits": num_audits}
    more = {"audit_fraction": arguments.audits, "copies": arguments.copies, "num_tokens": arguments.tokens}
    print_result("audit_cost", setting, **{**renamed, **results}, **more)


def _cpu_s(servers: LocalSwarm) -> float:
    """Processor time of the servers and of this process so far."""
    ticks = 0
    for server in servers.servers:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def _join(directory: str, servers: LocalSwarm, share: float) -> Any:
    peers = JoinLink.parse(servers.link).initial_peers
    config = ClientConfig(initial_peers=peers, audit_fraction=share)
    return AutoDistributedModelForCausalLM.from_pretrained(directory, client_config=config).eval()


if __name__ == "__main__":
    main()
