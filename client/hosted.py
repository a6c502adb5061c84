"""Adapters that servers host: which one a name means, and that it is not mixed with the client's own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from swarm.announcement import AdapterListing, Announcement
from swarm.errors import BadRequest
from swarm.model.adapters import ModelAdapter
from swarm.ranges import BlockRange

SHOWN = 8
"""So many adapters are named where the one that was asked for is not among them."""


def choose_adapter(servers: Collection[Announcement], wanted: str, blocks: BlockRange) -> AdapterListing:
    """Return the adapter that a name means: one digest, whatever else is called so.

    Of several with the name, it is the one that is served for most blocks, then by most servers.

    Args:
        wanted: a name, or NAME@DIGEST, where the first digits are enough.
    Raises: BadRequest: nobody has one of that name.
    """
    name, _, digits = wanted.partition("@")
    having: dict[AdapterListing, list[Announcement]] = {}
    for server in servers:
        for listing in server.adapters:
            having.setdefault(listing, []).append(server)
    fitting = [each for each in having if each.name == name and each.digest.startswith(digits.lower())]
    if not fitting:
        known = sorted(map(str, having))
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        raise BadRequest(
            f"no server of this model hosts an adapter {wanted!r}: they host {', '.join(known[:SHOWN]) or 'none'}{more}"
        )

    def worth(listing: AdapterListing) -> tuple[int, int, str]:
        return len(blocks_with(having[listing]) & set(blocks)), len(having[listing]), listing.digest

    return max(fitting, key=worth)


def blocks_with(servers: Sequence[Announcement]) -> set[int]:
    """The blocks that some servers have together."""
    return {block for server in servers for block in server.blocks}


def check_one_way(adapters: ModelAdapter | None, hosted: AdapterListing | None) -> None:
    """Raise BadRequest if a call would be changed by adapters of its own and by a hosted one."""
    if hosted is not None and any(adapter is not None for adapter in adapters or ()):
        raise BadRequest(
            f"this call has adapters of its own and the hosted adapter {hosted}: use one of them "
            "(model.use_adapter(None) leaves the hosted one out, PEFT's disable_adapter() the model's own)"
        )
