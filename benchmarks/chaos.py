"""Does anything that happens to servers change what comes out? Seeded runs in which one to three things go wrong.

Five server processes hold every block of a model twice, in ranges that do not end at the same blocks; their links, of
data and of the directory, are shaped. At random tokens of a generation, or at random moments of forward and backward,
servers are killed, frozen, slowed down tenfold, cut off, or told to leave or to serve other blocks; every block stays
with one of those that are well. The reference is the undisturbed local model: all tokens, and all gradients, must be
equal.

    python benchmarks/chaos.py --runs 100 --training-runs 50
    python benchmarks/chaos.py --runs 0 --training-runs 0 --pauses 7
    python benchmarks/chaos.py --shape 124M --runs 0 --training-runs 0 --pauses 7
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import SHAPES, VOCAB_SIZE, make_model, print_plain, rounded, say
from shaper import Link, Quality, Shaper
from tasks import TokenTimes
from wan import OUTSIDE, free_ports

from swarm import AutoDistributedModelForCausalLM
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.server import LocalSwarm

Range = tuple[int, int]

QUARTERS = ((0, 2), (2, 4), (0, 1), (1, 3), (3, 4))
"""Which quarters of the model's blocks servers hold."""
ELSEWHERE = ((2, 4), (0, 2), (3, 4), (0, 2), (0, 1))
"""Where they move to."""
FLAGS = ("--announce-period", "3", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "1")
SLOW_PERIOD_S, SLOW_SHARE = 0.1, 0.9
"""A slowed server is frozen for this share of each period."""
TOLERANCE = 1e-5


def in_quarters(num_blocks: int, quarters: Sequence[Range]) -> list[Range]:
    """Block ranges, of quarters of the model."""
    return [(start * num_blocks // 4, end * num_blocks // 4) for start, end in quarters]


class Victims:
    """Servers with links of their own, to which bad things are done; afterwards all are well again."""

    def __init__(self, model: str, num_blocks: int, shaper: Shaper, ports: Sequence[tuple[int, int]]) -> None:
        self._shaper = shaper
        self._ports = ports
        self._num_blocks = num_blocks
        self._ranges, self._elsewhere = (in_quarters(num_blocks, each) for each in (QUARTERS, ELSEWHERE))
        self.swarm = LocalSwarm(model, self._ranges, dtype="float32", arguments=FLAGS)
        self._slots: dict[int, Any] = {}
        """Link -> the server behind it."""
        self._slowing: list[tuple[threading.Event, threading.Thread]] = []
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._starting: list[Future[None]] = []
        self._harmed: set[int] = set()

    def start(self, slot: int) -> None:
        port, dht_port = self._ports[slot]
        flags = ("--port", str(port), "--dht-port", str(dht_port), "--announce-host", OUTSIDE)
        self._slots[slot] = self.swarm.add(self._ranges[slot], arguments=flags)

    def slot_of(self, hop: Any) -> int:
        ports = {int(address.rpartition(":")[2]) for address in hop.server.direct}
        return next(slot for slot, (port, _) in enumerate(self._ports) if port in ports)

    def choose(self, rng: random.Random, wanted: Sequence[int]) -> int | None:
        """One of the wanted slots, or else any, to which nothing has happened yet and which is not needed."""
        for slots in (wanted, range(len(self._ranges))):
            allowed = [slot for slot in slots if slot not in self._harmed and self._covered_without(slot)]
            if allowed:
                return rng.choice(allowed)
        return None

    def _covered_without(self, slot: int) -> bool:
        well = [self._ranges[each] for each in self._slots if each != slot and each not in self._harmed]
        return all(any(start <= block < end for start, end in well) for block in range(self._num_blocks))

    def harm(self, event: str, slot: int) -> None:
        """Do one thing to the server of a slot."""
        server = self._slots[slot]
        self._harmed.add(slot)
        if event == "kill":
            server.kill()
        elif event == "freeze":
            server.pause()
        elif event == "slow":
            self._slow_down(server)
        elif event == "cut":
            self._shaper.set(Quality(is_cut=True), [slot, slot + len(self._ranges)])
        elif event == "move":
            self._starting.append(self._pool.submit(server.move, self._elsewhere[slot]))
        else:
            self._starting.append(self._pool.submit(server.stop))

    def _slow_down(self, server: Any) -> None:
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                server.pause()
                over.wait(SLOW_PERIOD_S * SLOW_SHARE)
                server.resume()
                over.wait(SLOW_PERIOD_S * (1 - SLOW_SHARE))

        thread = threading.Thread(target=run)
        self._slowing.append((over, thread))
        thread.start()

    def heal(self) -> None:
        """Undo everything; servers that are gone are started anew, behind the same links."""
        for over, thread in self._slowing:
            over.set()
            thread.join()
        self._slowing.clear()
        for future in self._starting:
            future.result()
        self._starting.clear()
        self._shaper.set(Quality())
        for slot, server in self._slots.items():
            if server.alive:
                server.resume()
                if (server.blocks.start, server.blocks.end) != self._ranges[slot]:
                    self._starting.append(self._pool.submit(server.move, self._ranges[slot]))
            else:
                self._starting.append(self._pool.submit(self.start, slot))
        for future in self._starting:
            future.result()
        self._starting.clear()
        self._harmed.clear()

    def close(self) -> None:
        for over, thread in self._slowing:
            over.set()
            thread.join()
        self._pool.shutdown()
        self.swarm.close()


EVENTS = ("kill", "freeze", "slow", "cut", "drain", "move")


@contextmanager
def open_victims(model: str, num_blocks: int) -> Iterator[Victims]:
    numbers = free_ports(2 * len(QUARTERS))
    ports = list(zip(numbers[::2], numbers[1::2], strict=True))
    links = [Link(OUTSIDE, port, "127.0.0.1", port) for port, _ in ports]
    links += [Link(OUTSIDE, port, "127.0.0.1", port) for _, port in ports]
    with Shaper(links) as shaper:
        victims = Victims(model, num_blocks, shaper, ports)
        try:
            for slot in range(len(QUARTERS)):
                victims.start(slot)
            yield victims
        finally:
            victims.close()


class At(TokenTimes):
    """Does things when tokens come; the first one is number 0."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self._actions = actions

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self._actions.get(len(self.times_s) - 1, lambda: None)()


def generate(model: Any, ids: torch.Tensor, num_tokens: int, streamer: Any = None) -> torch.Tensor:
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    output: torch.Tensor = model.generate(ids, streamer=streamer, **options)
    return output


def gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss, embeddings)
    return found


def generation_run(victims: Victims, remote: Any, local: Any, seed: int, num_tokens: int) -> tuple[bool, list[str]]:
    rng = random.Random(seed)
    ids = torch.randint(0, VOCAB_SIZE, (1, 8), generator=torch.Generator().manual_seed(seed))
    happened: list[str] = []
    with remote.inference_session(max_length=num_tokens + 16) as session:

        def harm(event: str) -> None:
            route = [victims.slot_of(hop) for hop in session.route]
            slot = victims.choose(rng, route if rng.random() < 0.8 else ())
            if slot is not None:
                happened.append(event)
                victims.harm(event, slot)

        moments = sorted(rng.sample(range(num_tokens), rng.randint(1, 3)))
        actions = {moment: partial(harm, rng.choice(EVENTS)) for moment in moments}
        ours = generate(remote, ids, num_tokens, At(actions))
    return torch.equal(ours, generate(local, ids, num_tokens)), happened


def training_run(victims: Victims, remote: Any, local: Any, seed: int) -> tuple[bool, list[str]]:
    rng = random.Random(seed)
    ids = torch.randint(0, VOCAB_SIZE, (6, 16), generator=torch.Generator().manual_seed(seed))
    happened: list[str] = []
    lock = threading.Lock()

    def harm(event: str) -> None:
        with lock:
            slot = victims.choose(rng, ())
            if slot is not None:
                happened.append(event)
                victims.harm(event, slot)

    events = [rng.choice(EVENTS) for _ in range(rng.randint(1, 3))]
    timers = [threading.Timer(rng.uniform(0.0, 0.3), harm, (event,)) for event in events]
    for timer in timers:
        timer.start()
    wanted = gradient(local, ids)
    is_right = True
    while True:
        is_right &= bool((gradient(remote, ids) - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
        if not any(timer.is_alive() for timer in timers):
            break
    return is_right, happened


def measure_pause(victims: Victims, remote: Any, event: str, seed: int, context: int) -> tuple[float, float]:
    """The longest time between two tokens after something happened at a length, and that of one prefill of it."""
    ids = torch.randint(0, VOCAB_SIZE, (1, context), generator=torch.Generator().manual_seed(seed))
    started = time.monotonic()
    clock = At({})
    generate(remote, ids, 2, clock)
    prefill_s = clock.times_s[0] - started
    with remote.inference_session(max_length=context + 32) as session:
        hop = random.Random(seed)
        clock = At({8: lambda: victims.harm(event, victims.slot_of(hop.choice(session.route)))})
        generate(remote, ids, 24, clock)
    after_s = clock.times_s[8:]
    return max(later - earlier for earlier, later in itertools.pairwise(after_s)), prefill_s


def repeat(
    number: int, first_seed: int, victims: Victims, run: Callable[[int], tuple[bool, list[str]]]
) -> dict[str, Any]:
    """Run many times; count what happened, and name the seeds that went wrong."""
    events: Counter[str] = Counter()
    failed, seconds = [], []
    for seed in range(first_seed, first_seed + number):
        started = time.monotonic()
        is_right, happened = run(seed)
        seconds.append(time.monotonic() - started)
        events.update(happened)
        if not is_right:
            failed.append(seed)
        say(f"seed {seed}: {', '.join(happened)}: {'right' if is_right else 'WRONG'} after {seconds[-1]:.1f} s")
        victims.heal()
    if not number:
        return {}
    times = {"p50": rounded(statistics.median(seconds)), "max": rounded(max(seconds))}
    return {"runs": number, "right": number - len(failed), "failed_seeds": failed, "events": dict(events), "s": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--runs", type=int, default=20, help="generations")
    parser.add_argument("--training-runs", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pauses", type=int, default=0, help="how often to measure the pause after an event")
    parser.add_argument("--pause-event", default="kill", choices=EVENTS)
    parser.add_argument("--context", type=int, default=512, help="tokens of context at that")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        local = make_model(arguments.shape, "float32", directory)
        with open_victims(directory, local.config.num_hidden_layers) as victims:
            config = ClientConfig(
                initial_peers=JoinLink.parse(victims.swarm.link).initial_peers, silence_s=1.0, micro_batch_tokens=32
            )
            remote = AutoDistributedModelForCausalLM.from_pretrained(directory, client_config=config).eval()
            generated = repeat(
                arguments.runs,
                arguments.first_seed,
                victims,
                lambda seed: generation_run(victims, remote, local, seed, arguments.tokens),
            )
            trained = repeat(
                arguments.training_runs,
                1000 + arguments.first_seed,
                victims,
                lambda seed: training_run(victims, remote, local, seed),
            )
            pauses = []
            for seed in range(arguments.pauses):
                pauses.append(measure_pause(victims, remote, arguments.pause_event, seed, arguments.context))
                say(f"a pause of {pauses[-1][0]:.2f} s, a prefill takes {pauses[-1][1]:.2f} s")
                victims.heal()
            remote.close()
    results: dict[str, Any] = {"shape": arguments.shape, "generation": generated, "training": trained}
    if pauses:
        pause_s, prefill_s = (statistics.median(values) for values in zip(*pauses, strict=True))
        results["pause"] = {
            "event": arguments.pause_event,
            "context": arguments.context,
            "pause_s": rounded(pause_s),
            "prefill_s": rounded(prefill_s),
            "allowed_s": rounded(1.5 * prefill_s + 0.5),
            "samples": [[rounded(value) for value in pair] for pair in pauses],
        }
    print_plain("chaos", **results)
    if generated.get("failed_seeds") or trained.get("failed_seeds"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
