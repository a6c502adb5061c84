"""How a chain of streams ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from swarm.client.chain import Chain, Tickets


class Stream:
    """The client's end of a stream; a slow one. Nothing can be written to it after its end."""

    def __init__(self, *, broken: bool = False) -> None:
        self.said: list[str] = []
        self.broken = broken

    async def write(self, request: Any) -> None:
        if self.broken:
            raise asyncio.InvalidStateError("RPC already finished.")
        assert "end" not in self.said
        await asyncio.sleep(0)
        self.said.append(request.WhichOneof("kind"))

    async def done_writing(self) -> None:
        await asyncio.sleep(0)
        self.said.append("end")


async def test_a_chain_that_several_want_to_end_ends_once_and_in_order() -> None:
    hops = [SimpleNamespace(peer_id=name) for name in "AB"]
    chain = Chain(cast(Any, None), cast(Any, None), cast(Any, hops), Tickets(), lambda: None)
    streams = chain._calls = cast(Any, [Stream(), Stream()])
    chain._listeners = []
    await asyncio.gather(*(chain.finish() for _ in range(3)))
    assert [each.said for each in streams] == [["close", "end"]] * 2


async def test_a_hop_that_has_gone_does_not_keep_the_others_from_hearing_of_the_end() -> None:
    hops = [SimpleNamespace(peer_id=name) for name in "ABC"]
    chain = Chain(cast(Any, None), cast(Any, None), cast(Any, hops), Tickets(), lambda: None)
    streams = chain._calls = cast(Any, [Stream(broken=True), Stream(), Stream()])
    chain._listeners = []
    await chain.finish()
    assert [each.said for each in streams] == [[], ["close", "end"], ["close", "end"]]
