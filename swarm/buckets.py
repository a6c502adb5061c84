"""Where in the directory a server's entry lies: buckets, which form a tree that grows with the swarm.

A bucket holds the entries of at most CAPACITY servers. A server writes into the root while there is room, else into
the bucket below it that its first digit names, and so on. So a small swarm is one bucket, read at once, and of a large
one a reader sees at least as much as it has read buckets; a flood of entries fills buckets and makes none larger.

    swarm/2/model/<fingerprint>           announcements. First digit: in which sixteenth of the model its range begins;
    swarm/2/model/<fingerprint>/7         the others: of the hash of its peer id
    swarm/2/model/<fingerprint>/7a
    swarm/2/models, swarm/2/models/c …    who serves which model. Digits of the hash of the fingerprint
    swarm/2/meeting/<sha-256 of a name>   peers that do something together, and where; there are none below
    swarm/2/revocations                   of a private swarm: the owner's newest list, as members pass it on; none below
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

CAPACITY = 64
"""Servers in one bucket."""

FANOUT = 16
"""Buckets below one."""

MAX_DEPTH = 3
"""Levels below the root: room for a quarter of a million servers."""

LIKELY_FULL = CAPACITY // 2
"""With so many entries, there may be some below: others than these have seen it full."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One bucket of a tree."""

    tree: str
    digits: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Under which it is kept."""
        path = "".join(f"{digit:x}" for digit in self.digits)
        return f"{self.tree}/{path}" if path else self.tree

    def below(self) -> list[Bucket]:
        """The buckets of the next level."""
        return [Bucket(self.tree, (*self.digits, digit)) for digit in range(FANOUT) if len(self.digits) < MAX_DEPTH]


MODELS = Bucket("swarm/2/models")
REVOCATIONS = Bucket("swarm/2/revocations")


def servers_root(model_fingerprint: str) -> Bucket:
    """The bucket in which the search for servers of a model begins."""
    return Bucket(f"swarm/2/model/{model_fingerprint}")


def meeting_root(name: str) -> Bucket:
    """The bucket in which peers that know this name find one another."""
    return Bucket(f"swarm/2/meeting/{hashlib.sha256(name.encode()).hexdigest()}")


def sixteenth(block: int, num_model_blocks: int) -> int:
    """In which of FANOUT parts of the model a block lies."""
    return block * FANOUT // num_model_blocks


def path_of_server(peer_id: str, start: int, num_model_blocks: int) -> tuple[int, ...]:
    """The digits of a server's buckets, from the first level down."""
    return (sixteenth(start, num_model_blocks), *_digits(peer_id))[:MAX_DEPTH]


def path_of_model(model_fingerprint: str) -> tuple[int, ...]:
    """The same for the listing of a model."""
    return _digits(model_fingerprint)


def _digits(text: str) -> tuple[int, ...]:
    return tuple(int(digit, FANOUT) for digit in hashlib.sha256(text.encode()).hexdigest()[:MAX_DEPTH])
