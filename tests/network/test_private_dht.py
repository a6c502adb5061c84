"""A private swarm's DHT on real libp2p nodes: members find each other; a stranger gets nothing out of it or into it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swarm import relays
from swarm.admission import NOT_A_MEMBER
from swarm.announcement import Announcement
from swarm.buckets import MODELS, REVOCATIONS, servers_root
from swarm.dht import Dht, DhtConfig, open_dht
from swarm.dht_records import RECORD_LIFETIME_S, sign_record
from swarm.dial_back import answer_dial_back, ask
from swarm.dialling import Anywhere, UntilSeenOutside
from swarm.errors import NotAMember, PeerError, PeerUnavailable
from swarm.identity import Identity, pack_certificate
from swarm.membership import Invitation, Revocations, Role
from swarm.reach import Question
from swarm.relaying import serve_relay
from swarm.relays import Request, ask_relay, open_relayed_stream

MODEL = "f" * 64
SECRET = "a model that nobody else shall know of"
TIMEOUT_S = 20.0

Make = Callable[..., Announcement]


@dataclass
class Private:
    """A private swarm of one node that has announced a server."""

    owner: Identity
    server: Dht
    peers: tuple[str, ...]
    announcement: Announcement
    owned: AsyncExitStack

    def invite(self, role: Role = Role.SERVE, lifetime_s: float = 600.0) -> Invitation:
        return Invitation.make(self.owner, role, time.time() + lifetime_s)

    async def join(self, invitation: Invitation | None, **options: Any) -> Dht:
        config = DhtConfig(
            initial_peers=self.peers, invitation=invitation, revocation_period_s=0.2, startup_timeout_s=60.0, **options
        )
        return await self.owned.enter_async_context(open_dht(config))


@pytest.fixture
async def private(make_announcement: Make, tmp_path: Path, identities: list[Identity]) -> AsyncIterator[Private]:
    owner = Identity.load_or_create(tmp_path / "owner.key")
    async with AsyncExitStack() as owned:
        invitation = Invitation.make(owner, Role.SERVE, time.time() + 3600)
        config = DhtConfig(
            identity_path=identities[0].path,
            invitation=invitation,
            revocations_path=tmp_path / "revoked",
            revocation_period_s=0.2,
        )
        server = await owned.enter_async_context(open_dht(config))
        announcement = make_announcement(model_name=SECRET)
        await server.directory.announce(announcement)
        yield Private(owner, server, tuple(await server.multiaddrs()), announcement, owned)


async def _stranger(private: Private) -> Dht:
    """A node of no swarm that has a libp2p connection to the private one's."""
    stranger = await private.owned.enter_async_context(open_dht(DhtConfig()))
    await stranger.connect(private.server.peer_id, private.peers, timeout_s=TIMEOUT_S)
    return stranger


def _pretend(node: Dht, credential: bytes) -> None:
    """Let a node show this credential with its messages, and believe everybody."""

    class Forged:
        def __init__(self) -> None:
            self.credential = credential

        def admit(self, *_: object, **__: object) -> None:
            return None

    node.p2p.gate = Forged()  # type: ignore[attr-defined]


async def _each_message(private: Private, node: Dht) -> dict[str, str]:
    """What the private swarm's node says to each kind of message that hivemind's DHT knows."""
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2PHandlerError, PeerID
    from hivemind.proto import dht_pb2

    stub = node._node.protocol.get_stub(PeerID.from_base58(private.server.peer_id))
    key = DHTID.generate(MODELS.key).to_bytes()
    known = node._node.protocol.node_info
    messages = {
        "rpc_ping": dht_pb2.PingRequest(peer=known),
        "rpc_find": dht_pb2.FindRequest(keys=[key], peer=known),
        "rpc_store": dht_pb2.StoreRequest(
            keys=[key], subkeys=[b"\xc4\x01a"], values=[b"\xc4\x01a"], expiration_time=[time.time() + 60],
            in_cache=[False], peer=known,
        ),
    }  # fmt: skip
    answers = {}
    for name, message in messages.items():
        with pytest.raises(P2PHandlerError) as refused:
            await getattr(stub, name)(message, timeout=TIMEOUT_S)
        answers[name] = str(refused.value)
    return answers


def _assert_refused_without_a_reason(answers: dict[str, str]) -> None:
    for name, text in answers.items():
        assert NOT_A_MEMBER in text, name
        for told in (SECRET, MODEL, "expired", "revoked", "credential", "token of"):
            assert told not in text, name


async def test_members_find_the_servers_and_each_other(private: Private) -> None:
    user = await private.join(private.invite(Role.USE), client_mode=True)
    assert [each.name for each in await user.directory.models()] == [SECRET]
    assert [each.peer_id for each in await user.directory.servers(MODEL)] == [private.server.peer_id]
    assert await user.directory.meet("a meeting", ["/ip4/127.0.0.1/tcp/1/p2p/" + user.peer_id], 60.0)


async def test_a_stranger_cannot_join(private: Private) -> None:
    with pytest.raises(NotAMember, match="private") as refused:
        await private.join(None)
    assert SECRET not in str(refused.value)


async def test_a_strangers_messages_are_refused_and_change_nothing(
    private: Private, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = await _stranger(private)
    before = len(private.server._node.protocol.storage)
    with caplog.at_level("INFO", logger="swarm.admission"):
        _assert_refused_without_a_reason(await _each_message(private, stranger))
    assert len(private.server._node.protocol.storage) == before
    assert not private.server._node.protocol.routing_table.peer_id_to_uid  # the stranger is not in it
    assert caplog.text.count("there is no credential") == 3


@pytest.mark.parametrize("why", ["expired", "revoked", "copied"])
async def test_the_holder_of_a_token_that_does_not_count_is_refused_like_a_stranger(
    private: Private, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = await _stranger(private)
    invitation = private.invite(lifetime_s=-5.0 if why == "expired" else 600.0)
    bearer = private.server.identity if why == "copied" else stranger.identity
    _pretend(stranger, invitation.credential(bearer.public_key))
    if why == "revoked":
        assert private.server.gate is not None
        private.server.gate.adopt(Revocations.make(private.owner, 1, [invitation.member], now_s=time.time()).data)
    with caplog.at_level("INFO", logger="swarm.admission"):
        _assert_refused_without_a_reason(await _each_message(private, stranger))
    assert {"expired": "expired", "revoked": "was revoked", "copied": "another peer"}[why] in caplog.text


async def test_a_node_that_only_pretends_to_be_a_member_is_not_believed(private: Private) -> None:
    impostor = await private.owned.enter_async_context(open_dht(DhtConfig()))
    peers = tuple(await impostor.multiaddrs())
    with pytest.raises(PeerUnavailable, match="none of the initial peers answers"):
        async with open_dht(DhtConfig(initial_peers=peers, invitation=private.invite(), startup_timeout_s=10.0)):
            pass


async def test_a_strangers_streams_are_closed_without_a_word(private: Private) -> None:
    stranger = await _stranger(private)
    peer_id = private.server.peer_id
    async with (
        serve_relay(private.server),
        answer_dial_back(private.server.p2p, UntilSeenOutside(Anywhere()), relays=True),
    ):
        for request in (Request(register_me=True), Request(to=peer_id), Request(punch=peer_id)):
            with pytest.raises(PeerError):
                await ask_relay(stranger, peer_id, request, TIMEOUT_S)
        with pytest.raises(PeerError):
            await ask(stranger, peer_id, Question(port=1), timeout_s=TIMEOUT_S)
        reader, writer = await stranger.open_stream(peer_id, relays.PROTOCOL, timeout_s=TIMEOUT_S)
        writer.write(bytes(500))
        async with asyncio.timeout(TIMEOUT_S):
            assert await reader.read() == b""
        writer.close()


async def test_members_relay_for_each_other_until_one_is_revoked(private: Private) -> None:
    hidden = await private.join(private.invite(), client_mode=True)
    invitation = private.invite(Role.USE)
    caller = await private.join(invitation, client_mode=True)

    async def echo(_info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    await hidden.p2p.add_binary_stream_handler(relays.TUNNEL_PROTOCOL, echo)
    relay_id = private.server.peer_id
    async with (
        serve_relay(private.server),
        answer_dial_back(private.server.p2p, UntilSeenOutside(Anywhere()), relays=True),
        asyncio.timeout(60),
    ):
        assert (await ask(caller, relay_id)).answer.relays
        registered = await ask_relay(hidden, relay_id, Request(register_me=True), TIMEOUT_S)
        reader, writer = await open_relayed_stream(caller, relay_id, hidden.peer_id, timeout_s=TIMEOUT_S)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert private.server.gate is not None
        private.server.gate.adopt(Revocations.make(private.owner, 1, [invitation.member], now_s=time.time()).data)
        assert await reader.read() == b""  # the relay has ended the stream
        with pytest.raises(PeerError):
            await open_relayed_stream(caller, relay_id, hidden.peer_id, timeout_s=TIMEOUT_S)
        for each in (registered[1], writer):
            each.close()


async def test_what_a_use_member_announces_is_ignored_by_everybody(private: Private, make_announcement: Make) -> None:
    user = await private.join(private.invite(Role.USE))
    await user.directory.announce(make_announcement(user.peer_id, model_name="a trap"))
    reader = await private.join(private.invite(), client_mode=True)
    for node in (reader, private.server):
        assert [each.peer_id for each in await node.directory.servers(MODEL)] == [private.server.peer_id]
        assert [each.name for each in await node.directory.models()] == [SECRET]
    assert reader.directory.statistics().num_dropped == 2


async def test_a_revocation_reaches_everybody_and_ends_what_the_member_had(
    private: Private, make_announcement: Make, tmp_path: Path
) -> None:
    invitation = private.invite()
    leaving = await private.join(invitation)
    reader = await private.join(private.invite(), client_mode=True)
    await leaving.directory.announce(make_announcement(leaving.peer_id))
    assert len(await reader.directory.servers(MODEL)) == 2
    newest = Revocations.make(private.owner, 1, [invitation.member], now_s=time.time())
    (tmp_path / "revoked").write_bytes(newest.data)  # as `swarm revoke` on the owner's computer does

    async with asyncio.timeout(TIMEOUT_S):
        while reader.gate is None or not reader.gate.revocations.sequence:
            await asyncio.sleep(0.05)
    assert reader.gate.was_revoked(leaving.peer_id)
    assert [each.peer_id for each in await reader.directory.servers(MODEL)] == [private.server.peer_id]
    _assert_refused_without_a_reason(await _each_message(private, leaving))


async def test_the_newest_list_outlives_the_owner_and_an_older_one_does_not_replace_it(
    private: Private, tmp_path: Path
) -> None:
    first, second = private.invite(), private.invite()
    lists = [
        Revocations.make(private.owner, number, gone, now_s=time.time())
        for number, gone in ((1, [first.member]), (2, [first.member, second.member]))
    ]
    path = tmp_path / "kept by a member"
    async with AsyncExitStack() as owned:
        config = DhtConfig(initial_peers=private.peers, invitation=private.invite(), revocations_path=path)
        member = await owned.enter_async_context(open_dht(config))
        assert member.gate is not None and member.revocations is not None and private.server.revocations is not None
        member.gate.adopt(lists[1].data)
        await member.revocations.share()
        assert private.server.gate is not None and private.server.gate.revocations.sequence == 2
        path_of_old = tmp_path / "old"
        path_of_old.write_bytes(lists[0].data)
        stale = await private.join(private.invite(), revocations_path=path_of_old)
        assert stale.gate is not None and stale.gate.revocations.sequence == 2
        assert path_of_old.read_bytes() == lists[1].data
    assert path.read_bytes() == lists[1].data and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(NotAMember):
        await private.join(second)
    config = DhtConfig(invitation=private.invite(), revocations_path=path)
    async with open_dht(config) as restarted:
        assert restarted.gate is not None and restarted.gate.revocations.sequence == 2


async def test_forged_and_copied_records_are_neither_stored_nor_believed(private: Private) -> None:
    """A member writes what looks like another's record, and like records of people who were never invited."""
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.p2p import PeerID
    from hivemind.utils.timed_storage import ValueWithExpiration

    member = await private.join(private.invite())
    protocol, target = member._node.protocol, PeerID.from_base58(private.server.peer_id)
    bucket = DHTID.generate(servers_root(MODEL).key)
    now_s = time.time()
    theirs = member.gate.credential if member.gate is not None else b""
    with Identity.ephemeral() as stranger, Identity.ephemeral() as victim:
        credentials = {
            "none": b"",
            "another peer's": theirs,
            "another swarm's": Invitation.make(victim, Role.SERVE, now_s + 60).credential(stranger.public_key),
        }
        for what, credential in credentials.items():
            value = sign_record(
                stranger, bucket.to_bytes(), private.announcement.to_bytes(), written_at_s=now_s, lifetime_s=60.0,
                credential=credential,
            )  # fmt: skip
            stored = await protocol.call_store(
                target, [bucket], [value], now_s + RECORD_LIFETIME_S, subkeys=[stranger.public_key]
            )
            assert stored == [False], what
            poisoned = DictionaryDHTValue()
            poisoned.store(stranger.public_key, value, now_s + RECORD_LIFETIME_S)
            assert not private.server._node.protocol._validate_dictionary(bucket.to_bytes(), poisoned), what
            assert ValueWithExpiration(poisoned, now_s) is not None
    assert [each.peer_id for each in await member.directory.servers(MODEL)] == [private.server.peer_id]


async def test_a_list_of_revocations_that_the_owner_has_not_signed_is_not_kept(
    private: Private, tmp_path: Path
) -> None:
    member = await private.join(private.invite())
    assert member.gate is not None and private.server.gate is not None
    with Identity.ephemeral() as other:
        forged = Revocations.make(other, 9, [private.server.gate._membership.member], now_s=time.time())
    shelves = member.directory._shelves
    await shelves.write(REVOCATIONS, forged.data, 60.0)
    assert not (await shelves.read(REVOCATIONS)).entries
    assert private.server.gate.revocations.sequence == member.gate.revocations.sequence == 0


async def test_a_record_with_a_swapped_certificate_or_played_again_is_refused(
    private: Private, make_announcement: Make, identities: list[Identity]
) -> None:
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID

    member = await private.join(private.invite())
    target = PeerID.from_base58(private.server.peer_id)
    victim = private.server.identity.public_key
    bucket = DHTID.generate(servers_root(MODEL).key)
    first, first_s = private.server._node.protocol.storage.get(bucket).value.get(victim)
    await private.server.directory.announce(make_announcement(state="draining"))
    certificates = [pack_certificate(each.tls_certificate().certificate_der) for each in (identities[0], identities[3])]
    assert certificates[0] in first
    attempts = {
        "a swapped certificate": (bucket, first.replace(*certificates), first_s),
        "the same, as if it were newer": (bucket, first.replace(*certificates), first_s + 5),
        "an old record again": (bucket, first, first_s),
        "an old record, as if it were newer": (bucket, first, first_s + 5),
        "in another bucket": (DHTID.generate(MODELS.key), first, first_s + 5),
    }
    for what, (key, value, expiration_s) in attempts.items():
        stored = await member._node.protocol.call_store(target, [key], [value], expiration_s, subkeys=[victim])
        assert stored == [False], what
    [found] = await member.directory.servers(MODEL)
    assert (found.state, found.tls_certificate) == ("draining", identities[0].tls_certificate().certificate_der)
