"""How a chain of streams ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from swarm.client.chain import Chain, Tickets


class Stream:
    """The client's end of a stream; a slow one. Nothing can be written to it after its end."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def write(self, request: Any) -> None:
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
