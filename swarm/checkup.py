"""What can be reached of a swarm from here, which way and how fast, and whether others can reach this machine.

`examine` gathers a Report; what it means is said in swarm/diagnosis.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc.aio
import psutil

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement, ModelListing
from swarm.connector import open_connector
from swarm.dht import Dht
from swarm.diagnosis import ModelCheck, OwnCheck, PeerCheck, Report, ServerCheck
from swarm.dial_back import ask, ask_some
from swarm.errors import BadRequest, PeerError, SwarmError
from swarm.peers import PeerAddress
from swarm.reach import judge, outside_first
from swarm.rpc import errors_from_wire
from swarm.tunnel import Way
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
NUM_CALLS, CALLS_TIMEOUT_S = 3, 10.0
"""Of so many, the quickest is the round-trip time; how long all of them may take."""
PADDING_BYTES, PADDING_TIMEOUT_S = 1 << 20, 30.0
"""What is sent to each server, and back, to see how fast its way is; how long that may take."""
MAX_MODELS, MAX_SERVERS = 16, 64
"""How many are looked at, and how many servers of each: what strangers announce has no end."""
MEASURING_TIMEOUT_S = 60.0
"""After so long, the other servers of a model are not measured any more."""


async def examine(dht: Dht, model_name: str = "", port: int = 0) -> Report:
    """Look at a swarm from here.

    Args:
        model_name: look at the servers of this model only; empty: of all.
        port: TCP port of this machine that others shall try; 0: any free one.
    Raises: PeerUnavailable: the directory cannot be read. BadRequest: nobody serves that model.
    """
    peers = dht.known_peers()
    listings = await dht.directory.models()
    wanted = [each for each in listings if model_name in ("", each.name) or each.fingerprint.startswith(model_name)]
    if model_name and not wanted:
        served = ", ".join(listing.name for listing in listings[:8]) or "no model"
        raise BadRequest(
            f"nobody serves {model_name!r} in this swarm, which serves {served}: name one of these, or none"
        )
    initial = {each: multiaddrs for each, multiaddrs in peers.items() if each in dht.initial_peer_ids}
    own, checked = await asyncio.gather(_check_own(dht, outside_first(peers), port), _check_peers(dht, initial))
    models = [await _check_model(dht, listing) for listing in wanted[:MAX_MODELS]]
    return Report(own=own, peers=tuple(checked), models=tuple(models))


async def _check_own(dht: Dht, peer_ids: Iterable[str], port: int) -> OwnCheck:
    async with _listening(port) as tried:
        seen = await ask_some(dht, peer_ids, tried)
    from_link = [each for each in seen if each.peer_id in dht.initial_peer_ids]
    seen_as = tuple(dict.fromkeys(each.answer.host for each in from_link or seen if each.answer.host))
    ours = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return OwnCheck(
        port=tried,
        is_chosen=bool(port),
        seen_as=seen_as,
        is_translated=bool(seen_as) and not ours.intersection(seen_as),
        reach=judge(seen, trusted=dht.initial_peer_ids, own=ours),
    )


@asynccontextmanager
async def _listening(port: int) -> AsyncIterator[int]:
    """Listen on a port of all interfaces, if nobody else does, and yield it."""

    def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    try:
        server = await asyncio.start_server(accept, "0.0.0.0", port)
    except OSError as exc:
        logger.info("port %d is in use, perhaps by a server of this machine: it is tried as it is (%s)", port, exc)
        yield port
        return
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _check_peers(dht: Dht, peers: dict[str, list[str]]) -> list[PeerCheck]:
    async def check(peer_id: str, multiaddrs: list[str]) -> PeerCheck:
        found = PeerCheck(peer_id=peer_id, multiaddrs=tuple(multiaddrs))
        try:
            await dht.connect(peer_id, multiaddrs, timeout_s=CONNECT_TIMEOUT_S)
        except PeerError as exc:
            return replace(found, error=str(exc))
        try:
            seen = min([await ask(dht, peer_id) for _ in range(NUM_CALLS)], key=lambda each: each.rtt_s)
        except PeerError as exc:
            logger.info("peer %s can be reached but answers no questions: %s", peer_id, exc)
            return found
        return replace(found, rtt_s=seen.rtt_s, clock_offset_s=seen.clock_offset_s, relays=seen.answer.relays)

    return await asyncio.gather(*(check(peer_id, multiaddrs) for peer_id, multiaddrs in peers.items()))


async def _check_model(dht: Dht, listing: ModelListing) -> ModelCheck:
    servers = (await dht.directory.servers(listing.fingerprint))[:MAX_SERVERS]
    async with AsyncExitStack() as owned:
        found = await asyncio.gather(*(_find_server(dht, owned, server) for server in servers))
        checks, until_s = [], time.monotonic() + MEASURING_TIMEOUT_S
        for check, channel in found:  # one after the other: they would share our line
            is_late = time.monotonic() > until_s
            checks.append(check if channel is None or is_late else await _call_server(check, channel))
    checks.sort(key=lambda check: (check.blocks.start, check.blocks.end, check.peer_id))
    return ModelCheck(name=listing.name, num_blocks=listing.num_blocks, servers=tuple(checks))


async def _find_server(
    dht: Dht, owned: AsyncExitStack, server: Announcement
) -> tuple[ServerCheck, grpc.aio.Channel | None]:
    """Open a channel to a server, directly or else through the tunnel; `owned` closes it."""
    found = ServerCheck(
        name=server.server_name,
        peer_id=server.peer_id,
        blocks=server.blocks,
        state=server.state,
        protocol_version=server.protocol_version,
    )
    address = PeerAddress.of(server)
    ways: list[Way] = []
    connector, puncher = await owned.enter_async_context(open_connector(dht, waits_s=(0.0,), on_way=ways.append))
    try:
        channel = await owned.enter_async_context(connector.lease(replace(address, multiaddrs=())))
        return replace(found, way="direct"), channel
    except PeerError as exc:
        logger.info("server %s cannot be dialled: %s", server.peer_id, exc)
    try:
        channel = await owned.enter_async_context(connector.lease(replace(address, direct=())))
    except PeerError as exc:
        return replace(found, error=str(exc)), None
    await puncher.wait_tried()
    way = ways[-1]
    if way.is_punched:
        channel = await owned.enter_async_context(connector.lease(replace(address, direct=())))
        return replace(found, way="punched"), channel
    return replace(found, way="relay" if way.relay_id else "libp2p", relay_id=way.relay_id), channel


async def _call_server(check: ServerCheck, channel: grpc.aio.Channel) -> ServerCheck:
    """Measure the way to a server: the round trip, then the speed, which stays unknown if that takes too long."""
    try:
        async with errors_from_wire(check.peer_id), asyncio.timeout(CALLS_TIMEOUT_S):
            calls = [await _describe(channel) for _ in range(NUM_CALLS)]
    except (SwarmError, TimeoutError) as exc:
        return replace(check, way="", error=str(exc) or f"it did not answer within {CALLS_TIMEOUT_S:.0f} s")
    described, rtt_s, answered_s = min(calls, key=lambda call: call[1])
    offset_s = described.clock_s - (answered_s - rtt_s / 2) if described.clock_s else None
    check = replace(check, rtt_s=rtt_s, clock_offset_s=offset_s)
    try:
        async with errors_from_wire(check.peer_id), asyncio.timeout(PADDING_TIMEOUT_S):
            _, up_s, _ = await _describe(channel, bytes(PADDING_BYTES))
            echoed, both_s, _ = await _describe(channel, bytes(PADDING_BYTES), echo=True)
    except (SwarmError, TimeoutError) as exc:
        logger.info("the speed of the way to server %s is unknown: %s", check.peer_id, exc or "it takes too long")
        return check
    is_whole = len(echoed.padding) == PADDING_BYTES
    return replace(
        check,
        upload_bytes_per_s=PADDING_BYTES / max(up_s - rtt_s, 1e-6),
        download_bytes_per_s=PADDING_BYTES / max(both_s - up_s, 1e-6) if is_whole else None,
    )


async def _describe(
    channel: grpc.aio.Channel, padding: bytes = b"", *, echo: bool = False
) -> tuple[pb.DescribeResponse, float, float]:
    """Call a server; return its answer, how many seconds it took, and at which Unix time it came."""
    request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION, padding=padding, echo=echo)
    started_s = time.monotonic()
    response = await pb_grpc.BlocksStub(channel).Describe(request)
    return response, time.monotonic() - started_s, time.time()
