"""How much do many people get out of one swarm, and how long does each of them wait?

    python benchmarks/serve_load.py --clients 1,8 --servers 1
    python benchmarks/serve_load.py --clients 8 --loop open --load 0.7
    python benchmarks/serve_load.py --clients 8 --prefill 2048 --training

Clients in separate processes generate at the same time; the reference, measured in turns in the same run, is local
`generate` with a batch of as many sequences of the same lengths. Closed loop: each client asks again when it has its
answer. Open loop: requests arrive at random (Poisson), at a share of the rate that the reference reaches, whether or
not earlier ones are done. With --prefill or --training: what one long prompt, or a person who trains, does to those
who decode.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from clients import Clients
from common import (
    Setting,
    model_and_servers,
    new_parser,
    p50_p95,
    print_result,
    ratios,
    rounded,
    say,
    setting_of,
)
from interference import Intrusion, measure_intrusion
from tasks import Generate, Request, generate_here, random_prompts
from watch import Watch

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the clients ask for."""

    clients: tuple[int, ...]
    """One row of the result for each number of clients."""
    clients_per_process: int
    loop: str
    prompt_tokens: int
    new_tokens: int
    requests: int
    """Of each client, in every sample."""
    load: float
    """Open loop: share of the reference's rate at which requests arrive."""
    seed: int
    limit_s: float
    """After so long no new sample of a row is begun."""


@dataclass(slots=True)
class Stage:
    """Everything that is up while a row is measured."""

    local: Any
    clients: Clients
    watch: Watch


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=1, num_samples=3)
    _add_arguments(parser)
    arguments = parser.parse_args()
    setting, load = setting_of(arguments), _load_of(arguments)
    intrusions = [
        Intrusion.prefill(arguments.prefill) if kind == "prefill" else Intrusion.training(arguments.training)
        for kind in ("prefill", "training")
        if getattr(arguments, kind)
    ]
    with model_and_servers(setting) as (local, directory, servers), Watch(directory, servers) as watch:
        say("servers are up, clients start")
        with Clients(directory, servers.link, max(load.clients), per_process=load.clients_per_process) as clients:
            stage = Stage(local, clients, watch)
            if not intrusions:
                rows = [_row(stage, setting, load, number) for number in load.clients]
            else:
                del local
                with Clients(directory, servers.link, 1) as intruder:
                    rows = [
                        measure_intrusion(
                            clients, intruder, each, _decoding(load, number), setting.num_samples, arguments.quiet_s
                        )
                        for number in load.clients
                        for each in intrusions
                    ]
    print_result("serve_load", setting, **_described(load), rows=rows)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", default="8", help="numbers of clients, for example 1,2,4,8,16,32")
    parser.add_argument(
        "--clients-per-process", type=int, default=1, help="above 1: clients share processes, as threads"
    )
    parser.add_argument("--loop", choices=("closed", "open"), default="closed")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--requests", type=int, default=1, help="of each client in every sample")
    parser.add_argument("--load", type=float, default=0.7, help="open loop: share of the local rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=240.0, help="no new sample of a row is begun after this")
    parser.add_argument(
        "--prefill", type=int, default=0, metavar="TOKENS", help="a long prompt arrives while others decode"
    )
    parser.add_argument(
        "--training", nargs="?", const="4x128", default="", metavar="BxL", help="somebody trains meanwhile"
    )
    parser.add_argument("--quiet-s", type=float, default=15.0, help="how long it is quiet before each disturbance")


def _load_of(arguments: argparse.Namespace) -> Load:
    return Load(
        clients=tuple(int(number) for number in arguments.clients.split(",")),
        clients_per_process=arguments.clients_per_process,
        loop=arguments.loop,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.tokens,
        requests=arguments.requests,
        load=arguments.load,
        seed=arguments.seed,
        limit_s=arguments.limit_s,
    )


def _row(stage: Stage, setting: Setting, load: Load, number: int) -> dict[str, Any]:
    """Measure one number of clients: local and swarm in turns."""
    local_runs: list[Request] = []
    swarm_runs: list[list[Request]] = []
    cpu: dict[str, list[float]] = {"clients": [], "servers": []}
    stage.clients.run(_decoding(load, number))
    decodes = stage.watch.decodes()
    _run_local(stage.local, load, number, WARM_UP_TOKENS)
    started_s = time.monotonic()
    for sample in range(setting.num_samples):
        local_runs.append(_run_local(stage.local, load, number, load.new_tokens))
        before = stage.clients.cpu_s(), stage.watch.cpu_s()
        swarm_runs.append(_run_clients(stage.clients, load, number, sample, local_runs[-1]))
        for name, now, then in zip(cpu, (stage.clients.cpu_s(), stage.watch.cpu_s()), before, strict=True):
            cpu[name].append(now - then)
        rates = _rate(swarm_runs[-1]), _rate(local_runs[-1:])
        say(f"{number} clients, sample {sample + 1}: {rates[0]:.1f} tokens/s, local {rates[1]:.1f}")
        if time.monotonic() - started_s > load.limit_s:
            break
    shared = {"decode_batch_size": _batch_sizes(decodes, stage.watch.decodes())}
    return {"clients": number} | _summary(load, local_runs, swarm_runs) | _cpu_per_token(cpu, swarm_runs) | shared


def _decoding(load: Load, number: int, new_tokens: int = WARM_UP_TOKENS) -> list[Generate]:
    """One generation for each client."""
    return [
        Generate(prompt_tokens=load.prompt_tokens, new_tokens=new_tokens, seed=load.seed + index)
        for index in range(number)
    ]


def _run_local(model: Any, load: Load, number: int, new_tokens: int) -> Request:
    """One batch of `number` sequences; further ones would take as long again."""
    ids = random_prompts(number, load.prompt_tokens, load.seed).squeeze(1)
    return generate_here(model, ids, new_tokens)


def _run_clients(clients: Clients, load: Load, number: int, sample: int, local: Request) -> list[Request]:
    seed = load.seed + 1000 * sample
    arrivals = _arrivals(load, number, seed, local) if load.loop == "open" else [()] * number
    tasks = [
        Generate(
            prompt_tokens=load.prompt_tokens,
            new_tokens=load.new_tokens,
            num_requests=load.requests,
            arrivals_s=arrivals[index],
            seed=seed + index,
        )
        for index in range(number)
        if load.loop == "closed" or arrivals[index]
    ]
    return [request for requests in clients.run(tasks) for request in requests]


def _arrivals(load: Load, number: int, seed: int, local: Request) -> list[tuple[float, ...]]:
    """When requests come to each client: a Poisson process over all of them, dealt out in turn."""
    requests_per_s = load.load * _rate([local]) / load.new_tokens
    draw = random.Random(seed)
    now_s, arrivals_s = 0.0, []
    for _ in range(number * load.requests):
        now_s += draw.expovariate(requests_per_s)
        arrivals_s.append(now_s)
    return [tuple(arrivals_s[index::number]) for index in range(number)]


def _rate(requests: list[Request]) -> float:
    """Tokens per second from the first arrival to the last token."""
    seconds = max(each.ended_s for each in requests) - min(each.arrived_s for each in requests)
    return sum(each.num_tokens for each in requests) / seconds


def _steady_rate(requests: list[Request]) -> float | None:
    """Tokens per second while every request was decoding; None if there was no such time."""
    done = [each for each in requests if len(each.token_times_s) > 1]
    start_s = max((each.token_times_s[0] for each in done), default=0.0)
    end_s = min((each.token_times_s[-1] for each in done), default=0.0)
    if end_s <= start_s:
        return None
    rows = done[0].num_tokens // len(done[0].token_times_s)
    num_steps = sum(start_s < moment_s <= end_s for each in done for moment_s in each.token_times_s)
    return rows * num_steps / (end_s - start_s)


def _summary(load: Load, local_runs: list[Request], swarm_runs: list[list[Request]]) -> dict[str, Any]:
    requests = [request for run in swarm_runs for request in run]
    done = [request for request in requests if request.token_times_s]
    rates = {"local": [_rate([run]) for run in local_runs], "swarm": [_rate(run) for run in swarm_runs]}
    summary = ratios(rates) | {
        "local_first_token_s": p50_p95([run.first_token_s for run in local_runs]),
        "swarm_first_token_s": p50_p95([request.first_token_s for request in done]),
        "local_between_tokens_s": p50_p95([end - start for run in local_runs for start, end in run.gaps]),
        "swarm_between_tokens_s": p50_p95([end - start for request in done for start, end in request.gaps]),
        "num_requests": len(requests),
        "errors": sorted({request.error for request in requests if request.error}),
    }
    if load.loop == "closed" and load.requests == 1:
        # Without the first tokens: from when all decode until the first is done.
        steady = [_steady_rate([run]) for run in local_runs], [_steady_rate(run) for run in swarm_runs]
        local, swarm = (statistics.median(each for each in rates if each) if any(rates) else None for rates in steady)
        summary["decode_tokens_per_s"] = {"local": rounded(local), "swarm": rounded(swarm)}
        summary["decode_ratio"] = rounded(swarm / local) if local and swarm else None
    return summary


def _cpu_per_token(cpu: dict[str, list[float]], swarm_runs: list[list[Request]]) -> dict[str, Any]:
    """Processor time per token, to see how much of a shared machine the clients take."""
    num_tokens = [sum(request.num_tokens for request in run) for run in swarm_runs]
    return {
        "cpu_s_per_token": {
            name: rounded(
                statistics.median(seconds / max(1, count) for seconds, count in zip(each, num_tokens, strict=True))
            )
            for name, each in cpu.items()
        }
    }


def _batch_sizes(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> list[float | None]:
    """Decode steps in a pass, the mean of each server."""
    since = [(now[0] - then[0], now[1] - then[1]) for now, then in zip(after, before, strict=True)]
    return [rounded(steps / passes) if passes else None for steps, passes in since]


def _described(load: Load) -> dict[str, Any]:
    process = "a process each" if load.clients_per_process == 1 else f"{load.clients_per_process} to a process"
    return {
        "loop": load.loop,
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "requests": load.requests,
        "load": load.load if load.loop == "open" else None,
        "seed": load.seed,
        "client_processes": f"{process}, forked from one that has the libraries loaded",
    }


if __name__ == "__main__":
    main()
