"""Malformed inputs without end, the same for the same seed: good ones from a corpus, changed in a few places."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

MAX_BYTES = 16_384
MAX_CHANGES = 6
_SAYING_SOMETHING = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\xff" * 8, b"\xff" * 9 + b"\x01", b"\x00" * 8,
    b"\x7f\xf0" + b"\x00" * 6, b"NaN", b"1e999", b"-1", b"null", b"[" * 64, b"{" * 64, b'"', b"\\u0000",
    b"\xed\xa0\x80", b"\xc7\xff\x50", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xf8\x01", b"../", b"\n",
)  # fmt: skip
"""Ends of ranges, lengths that promise much, depths, and what formats do not expect."""


def malformed(corpus: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield inputs for ever; every sixteenth has nothing to do with the corpus."""
    while True:
        data = bytearray(rng.choice(corpus)) if rng.random() > 1 / 16 else bytearray(rng.randbytes(rng.randrange(256)))
        for _ in range(rng.randint(1, MAX_CHANGES)):
            rng.choice(_CHANGES)(data, corpus, rng)
        yield bytes(data[:MAX_BYTES])


def _flip(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _replace(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _say(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    said, at = rng.choice(_SAYING_SOMETHING), rng.randint(0, len(data))
    data[at : at + rng.choice((0, len(said)))] = said


def _cut(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    del data[start : min(end, start + rng.choice((1, 8, MAX_BYTES)))]


def _repeat(data: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    data[end:end] = data[start:end] * rng.choice((1, 1, 2, 20))
    del data[MAX_BYTES:]


def _splice(data: bytearray, corpus: Sequence[bytes], rng: random.Random) -> None:
    other = rng.choice(corpus)
    data[rng.randint(0, len(data)) :] = other[rng.randint(0, len(other)) :]


_CHANGES: tuple[Callable[[bytearray, Sequence[bytes], random.Random], None], ...] = (
    _flip, _replace, _say, _cut, _repeat, _splice,
)  # fmt: skip
