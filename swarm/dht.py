"""A node of the swarm's hivemind DHT on our own event loop: the one door to hivemind and libp2p.

`open_dht` starts a p2pd, connects it to the initial peers and runs hivemind's `DHTNode` (not `hivemind.DHT`, which
forks). How buckets lie in it is described in swarm/dht_records.py. hivemind takes a second to import and pulls
in torch, so it is imported when a DHT is opened, not with this module.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from swarm.admission import NOT_A_MEMBER, Gate
from swarm.dht_config import DhtConfig, daemon_options, parse_initial_peers, sole_use, usable_addresses
from swarm.dht_contacts import Contacts, KnownPeers
from swarm.dial_back import ask_initial
from swarm.directory import BucketDirectory, SwarmClock
from swarm.errors import NotAMember, PeerUnavailable, ResourceError
from swarm.identity import Identity
from swarm.p2pd import P2pd, finish, open_p2pd, open_socket_directory
from swarm.pipes import cancel_all
from swarm.revocations import SharedRevocations

if TYPE_CHECKING:
    from hivemind.dht import DHTNode
    from hivemind.p2p import P2P

logger = logging.getLogger(__name__)

STREAM_BUFFER_BYTES = 1024 * 1024
_RPC_TIMEOUT_S = 3.0
_CLOCK_NOTICE_S = 2.0
_CLOCK_WARNING_S = 60.0


class Dht:
    """An open DHT node; get one from `open_dht`."""

    directory: BucketDirectory
    p2p: P2P

    def __init__(self, config: DhtConfig, identity: Identity, daemon: P2pd) -> None:
        self.config = config
        self.identity = identity
        self.peer_id = identity.peer_id
        self.hidden = config.reachability == "private"
        """Whether this node listens, but others cannot dial it: it then only asks, as they would lose time on it."""
        self._daemon = daemon
        self._known = KnownPeers(parse_initial_peers(config.initial_peers, identity.peer_id), identity.peer_id)
        self._measuring = asyncio.Lock()
        self._node: DHTNode
        self._clock = SwarmClock()
        self.gate: Gate | None = None
        """Of a private swarm: whom this node lets in."""
        if config.invitation is not None:
            self.gate = Gate(config.invitation, identity, self._clock.now_s, config.revocations_path)
        self.revocations: SharedRevocations | None = None
        """Of a private swarm: the owner's newest list, in the directory."""
        self._sharing: asyncio.Task[None] | None = None

    async def multiaddrs(self) -> list[str]:
        """Where others can dial this node, /p2p/<peer id> included, loopback last; empty if it does not listen."""
        try:
            addresses = [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        except ValueError:  # hivemind's way to say "none"
            return []
        return sorted(addresses, key=lambda address: address.startswith(("/ip4/127.", "/ip6/::1/")))

    async def wait_stopped(self) -> None:
        """Wait until this node can no longer work, because p2pd or hivemind's connection to it ended.

        A supervisor then closes it and opens another one.
        """
        daemon = asyncio.create_task(self._daemon.wait_stopped())
        try:
            await asyncio.wait({daemon, self.p2p._client.control._read_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            daemon.cancel()
        logger.warning("this node's libp2p daemon ended: %s", self._daemon.last_line)

    async def connect(self, peer_id: str, multiaddrs: Sequence[str], *, timeout_s: float) -> None:
        """Make sure that there is a connection to a peer, over these addresses or those that libp2p finds itself.

        Raises: PeerUnavailable
        """
        from hivemind.p2p import PeerID
        from hivemind.proto import p2pd_pb2

        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=PeerID.from_base58(peer_id).to_bytes(), addrs=usable_addresses(multiaddrs, peer_id)
            ),
        )
        _, writer = await self._ask_daemon(request, peer_id, timeout_s)
        writer.close()

    @property
    def initial_peer_ids(self) -> Collection[str]:
        """The peers that this node has joined through, or tried to."""
        return self._known.initial.keys()

    def known_peers(self) -> dict[str, list[str]]:
        """Peers of this swarm, the initial ones first, and where each may be."""
        return self._known.candidates()

    async def connected_addresses(self) -> dict[str, list[str]]:
        """The peers that libp2p has connections to, and where these end: for a peer that listens, where it listens."""
        from hivemind.p2p import P2PDaemonError

        try:
            async with asyncio.timeout(_RPC_TIMEOUT_S):
                peers = await self.p2p.list_peers()
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError, ValueError, LookupError) as exc:
            logger.debug("libp2p does not say whom it is connected to: %r", exc)
            return {}
        addresses: dict[str, list[str]] = {}
        for peer in peers:
            addresses.setdefault(peer.peer_id.to_base58(), []).extend(map(str, peer.addrs))
        return addresses

    async def open_stream(
        self, peer_id: str, protocol: str, *, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a binary stream to a peer's handler for `protocol`; the caller closes the writer.

        Raises: PeerUnavailable
        """
        from hivemind.p2p import PeerID
        from hivemind.proto import p2pd_pb2

        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer_id).to_bytes(), proto=[protocol]),
        )
        stream = await self._ask_daemon(request, peer_id, timeout_s)
        if self.gate is not None:
            from swarm.dht_members import introduce

            try:
                await introduce(self.gate, stream, peer_id, protocol, timeout_s=timeout_s)
            except BaseException:
                stream[1].close()
                raise
        return stream

    async def _ask_daemon(
        self, request: Any, peer_id: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request over a connection of its own, as p2pd wants it, and leave that open if it succeeds."""
        from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
        from hivemind.proto import p2pd_pb2

        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(
                    str(self._daemon.control_socket), limit=STREAM_BUFFER_BYTES
                )
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                reason = " ".join(response.error.msg.split())[:300]  # libp2p lists its dials on several lines
                raise PeerUnavailable(f"peer {peer_id} cannot be reached: {reason}")
            opened, writer = writer, None
            return reader, opened
        except TimeoutError as exc:
            raise PeerUnavailable(f"peer {peer_id} did not answer within {timeout_s:.1f} s") from exc
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise PeerUnavailable("the libp2p daemon of this process has ended: open the DHT again") from exc
        finally:
            if writer is not None:
                writer.close()

    async def _keep_time(self) -> None:
        """Measure the clock again if it was set, and now and then; a swarm's first node is its own measure."""
        async with self._measuring:
            if self._known.initial and self._clock.is_doubtful(self._clock.steady_s()):
                await self._measure_clock(list(self._known.initial))

    async def _measure_clock(self, peer_ids: Sequence[str]) -> None:
        """Compare this machine's clock with those of some peers; if nobody answers, leave it at that."""
        self._clock.check_again()
        answers = await asyncio.gather(*map(self._clock_offset_s, peer_ids[:5]))
        offsets_s = [offset_s for offset_s in answers if offset_s is not None]
        if not offsets_s:
            return
        offset_s = median(offsets_s)
        self._clock.offset_s = offset_s if abs(offset_s) > _CLOCK_NOTICE_S else 0.0
        if abs(offset_s) > _CLOCK_WARNING_S:
            logger.warning("this machine's clock differs from the swarm's by %.0f s: set it right", offset_s)

    async def _clock_offset_s(self, peer_id: str) -> float | None:
        from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
        from hivemind.proto import dht_pb2

        stub = self._node.protocol.get_stub(PeerID.from_base58(peer_id))
        asked_s = self._clock.wall_s()
        try:
            response = await stub.rpc_ping(dht_pb2.PingRequest(), timeout=_RPC_TIMEOUT_S)
        except (TimeoutError, P2PDaemonError, P2PHandlerError):
            return None
        return float(response.dht_time) - (asked_s + self._clock.wall_s()) / 2

    async def _join(self, deadline_s: float) -> None:
        from hivemind.dht import DHTNode
        from hivemind.dht.routing import DHTID
        from hivemind.utils.multiaddr import Multiaddr

        from swarm.dht_guard import Guard, GuardedP2P, believe_no_places
        from swarm.dht_members import MemberP2P
        from swarm.dht_records import BucketStorage, RecordValidator
        from swarm.dht_shelves import DhtShelves

        # hivemind puts its sockets into /tmp; ours go into our private directory
        class PrivateP2P(MemberP2P, GuardedP2P):
            _UNIX_SOCKET_PREFIX = f"/unix{self._daemon.control_socket.parent}/"

        gate = self.gate
        self.p2p = p2p = await PrivateP2P.replicate(Multiaddr(f"/unix{self._daemon.control_socket}"))
        p2p.gate = gate
        storage = BucketStorage(self._clock.now_s, gate)
        p2p.guard = Guard(storage, self.config.request_rates, self.connected_addresses)
        self._known.is_refused = lambda: p2p.was_refused
        if self.config.may_be_hidden:
            self.hidden = (await ask_initial(self, self._known.initial, await self.multiaddrs())).is_hidden
        self._node = await DHTNode.create(
            p2p=self.p2p,
            node_id=DHTID.generate(source=self.peer_id),
            client_mode=self.config.client_mode or self.hidden,
            record_validator=RecordValidator(None if gate is None else gate.owner_key),
            wait_timeout=_RPC_TIMEOUT_S,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            reuse_get_requests=False,
        )
        # One storage, with our bounds, for what others store here and for what they call a cache.
        self._node.protocol.storage = self._node.protocol.cache = storage
        believe_no_places(self._node.protocol)
        self._contacts = Contacts(self._node, self, self._known)
        shelves = DhtShelves(self._node, self.identity, self._clock, self._contacts, self._keep_time, gate)
        self.directory = BucketDirectory(shelves, self.peer_id, self._clock, self._known.meet)
        if self._known.initial:
            timeout_s = deadline_s - asyncio.get_running_loop().time() - 0.1
            joined = await self._contacts.join(self._known.initial, timeout_s=timeout_s)
            if not joined and p2p.was_refused:
                raise NotAMember(f"{NOT_A_MEMBER}; ask its owner for one")
            if not joined:
                raise self._known.unreachable()
            await self._measure_clock(joined)
            await self._node.find_nearest_nodes([self._node.node_id])  # makes this node known to its neighbours
        if gate is not None:
            gate.on_revoked.append(self.directory.forget_found)
            self.revocations = SharedRevocations(gate, shelves, self._clock)
            await self.revocations.try_share()
            self._sharing = asyncio.create_task(self.revocations.run(self.config.revocation_period_s))

    async def _aclose(self) -> None:
        """Stop hivemind's tasks, which it cancels but does not wait for."""
        if not hasattr(self, "p2p"):
            return
        if self._sharing is not None:
            await cancel_all([self._sharing])
        if hasattr(self, "_contacts"):
            await self._contacts.aclose()
        control = self.p2p._client.control
        node = getattr(self, "_node", None)
        tasks = [self.p2p._listen_task, control._read_task, control._write_task, *control._handler_tasks.values()]
        if node is not None:
            node.is_alive = False
            tasks.append(node.cache_refresh_task)
        await self.p2p.shutdown()
        running = [task for task in tasks if task is not None and not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=1.0)


@asynccontextmanager
async def open_dht(config: DhtConfig) -> AsyncIterator[Dht]:
    """Start a DHT node and join the swarm of `config.initial_peers`, or start a new one.

    Raises:
        PeerUnavailable: none of the initial peers answers.
        NotAMember: the swarm is private, and this node's invitation is missing, has expired or was revoked.
        BadRequest: an address or the identity file is malformed.
        ResourceError: the port or the identity is in use.
    """
    await asyncio.to_thread(_import_hivemind)
    parse_initial_peers(config.initial_peers, "")
    async with AsyncExitStack() as owned:
        directory = owned.enter_context(open_socket_directory())
        identity_path = config.identity_path or directory / "identity.key"
        # Making a key takes 0.2 s. A cancelled start waits for it, or the thread would make the directory anew.
        identity = await finish(asyncio.to_thread(Identity.load_or_create, identity_path))
        owned.enter_context(sole_use(identity.path))
        daemon = await _start_daemon(owned, config, identity, directory)
        dht = Dht(config, identity, daemon)
        owned.push_async_callback(lambda: finish(dht._aclose()))
        try:
            async with asyncio.timeout(config.startup_timeout_s):
                await dht._join(asyncio.get_running_loop().time() + config.startup_timeout_s)
        except TimeoutError as exc:
            raise dht._known.unreachable() from exc
        yield dht


async def _start_daemon(owned: AsyncExitStack, config: DhtConfig, identity: Identity, directory: Path) -> P2pd:
    deadline_s = asyncio.get_running_loop().time() + config.startup_timeout_s
    try:
        return await owned.enter_async_context(
            open_p2pd(directory, daemon_options(config, identity.path), deadline_s=deadline_s)
        )
    except ResourceError as exc:
        if "address already in use" in str(exc):
            raise ResourceError(
                f"port {config.port} on {config.host} is already in use: stop what uses it, or choose another port"
            ) from exc
        raise


def _import_hivemind() -> None:
    """Import hivemind and undo what it does to logging: its own handler, at INFO, and the name of WARNING."""
    if "hivemind" in sys.modules:
        return
    import hivemind  # noqa: F401
    from hivemind.utils.logging import use_hivemind_log_handler

    use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
