"""Links between real processes that behave like a network: delay, jitter, bandwidth, stalls; cut and healed at will.

TCP connections to one address are passed on to another. What arrives leaves when the line has carried it, at so many
bytes a second for each direction of the link, and when it has travelled, always in order. So a lost packet is a stall,
as it is to a program that speaks TCP.

Used as a context manager; the links are carried by a process of their own.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

CHUNK_BYTES = 1 << 14
MAX_QUEUED_BYTES = 1 << 23
"""What is on its way in one direction of a connection; who sends more waits, as with a full socket."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What a link is like."""

    delay_s: float = 0.0
    """One way."""
    jitter_s: float = 0.0
    """At most so much longer, by chance."""
    bytes_per_s: float = 0.0
    """Of each direction; 0: no limit."""
    stall_s: float = 0.0
    stalls_per_s: float = 0.0
    """So often, on average, nothing moves for stall_s."""
    is_cut: bool = False
    """Nothing moves at all, and nobody is told."""


@dataclass(frozen=True, slots=True)
class Link:
    """From where to where connections are passed on."""

    host: str
    port: int
    target_host: str
    target_port: int


@dataclass(slots=True)
class _Line:
    """One direction of a link: what all of its connections share."""

    quality: Quality
    free_at_s: float = 0.0
    """When it has carried all that was given to it."""
    next_stall_s: float = 0.0
    stalled_until_s: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, quality: Quality, now_s: float) -> None:
        """Be like this from now on."""
        self.quality = quality
        self.stalled_until_s = 0.0
        self.next_stall_s = now_s + random.expovariate(quality.stalls_per_s) if quality.stalls_per_s else 0.0

    def arrival_s(self, num_bytes: int, now_s: float) -> float:
        """When bytes that are given to it now will be at the other end."""
        quality = self.quality
        seconds = num_bytes / quality.bytes_per_s if quality.bytes_per_s else 0.0
        self.free_at_s = max(self.free_at_s, now_s) + seconds
        self.free_at_s = max(self.free_at_s, self._stalled_until_s(now_s))
        return self.free_at_s + quality.delay_s + random.uniform(0, quality.jitter_s)

    def _stalled_until_s(self, now_s: float) -> float:
        """Until when nothing moves; stalls begin at random moments, as often whatever is sent."""
        quality = self.quality
        if not quality.stalls_per_s:
            return 0.0
        while self.next_stall_s <= now_s:
            self.stalled_until_s = self.next_stall_s + quality.stall_s
            self.next_stall_s += random.expovariate(quality.stalls_per_s)
        return self.stalled_until_s

    async def healed(self) -> None:
        while self.quality.is_cut:
            self.changed.clear()
            await self.changed.wait()


async def _carry(line: _Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what one end sends, until it ends."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_QUEUED_BYTES // CHUNK_BYTES)

    async def read() -> None:
        data = b"."
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except OSError:  # the end is gone: for the other one, the connection ends
                data = b""
            await queue.put((line.arrival_s(len(data), loop.time()), data))

    reading = asyncio.create_task(read())
    try:
        while True:
            arrival_s, data = await queue.get()
            await asyncio.sleep(max(0.0, arrival_s - loop.time()))
            await line.healed()
            if not data:
                break
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # nobody takes it any more
    finally:
        reading.cancel()
        writer.close()


async def _serve(links: Sequence[Link]) -> None:
    """Carry all links; take changes of their quality from standard input, a line each."""
    lines = [(_Line(Quality()), _Line(Quality())) for _ in links]
    tasks: set[asyncio.Task[object]] = set()

    async def accept(index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = links[index]
        try:
            others = await asyncio.open_connection(link.target_host, link.target_port)
        except OSError:
            writer.close()
            return
        for line, source, target in ((lines[index][0], reader, others[1]), (lines[index][1], others[0], writer)):
            task = asyncio.create_task(_carry(line, source, target))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def accepting(index: int):  # type: ignore[no-untyped-def]
        return lambda reader, writer: accept(index, reader, writer)

    for index, link in enumerate(links):
        await asyncio.start_server(accepting(index), link.host, link.port)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while command := await loop.run_in_executor(None, sys.stdin.readline):
        change = json.loads(command)
        for line in lines[change["index"]]:
            line.begin(Quality(**change["quality"]), loop.time())
            line.changed.set()
        print("done", flush=True)


class Shaper:
    """The process that carries links."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        self._lock = threading.Lock()

    def __enter__(self) -> Shaper:
        program = "import sys; sys.path.insert(0, sys.argv[1]); import shaper; shaper.carry(sys.argv[2])"
        links = json.dumps([asdict(link) for link in self.links])
        command = [sys.executable, "-c", program, str(Path(__file__).parent), links]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def set(self, quality: Quality, indices: Sequence[int] | None = None) -> None:
        """Change some links, or all."""
        assert self._process.stdin is not None
        for index in range(len(self.links)) if indices is None else indices:
            with self._lock:
                self._process.stdin.write(json.dumps({"index": index, "quality": asdict(quality)}) + "\n")
                self._process.stdin.flush()
                self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != word:
            raise RuntimeError(f"the shaper said {line!r} instead of {word!r}")


def _new_loop() -> asyncio.AbstractEventLoop:
    """With timers that are finer than the milliseconds of epoll."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def carry(links: str) -> None:
    """Carry links, given as JSON, until standard input ends."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_serve([Link(**each) for each in json.loads(links)]))
