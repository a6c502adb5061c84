from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES, MAX_HOSTED_ADAPTERS, AdapterListing, Announcement
from swarm.coordinates import Coordinates
from swarm.errors import BadRequest, ProtocolError
from swarm.ranges import BlockRange
from swarm.v1 import directory_pb2

Make = Callable[..., Announcement]


def read(data: bytes, **known: Any) -> Announcement:
    known = {"peer_id": "Q" * 46, "model_fingerprint": "f" * 64, "expires_at_s": 1.0} | known
    return Announcement.from_bytes(data, **known)


def test_announcement_survives_the_wire(make_announcement: Make) -> None:
    place = Coordinates(0.125, -0.25, 0.5, 0.75)
    announcement = make_announcement(model_commit="abc", quantization="int8", coordinates=place)
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{announcement.peer_id}"
    announcement = announcement.model_copy(update={"multiaddrs": [address]})
    known = announcement.model_dump(include={"peer_id", "model_fingerprint", "expires_at_s"})
    assert read(announcement.to_bytes(), **known) == announcement
    assert announcement.blocks == BlockRange(0, 4)
    assert len(announcement.to_bytes()) < 260


def test_hosted_adapters_survive_the_wire(make_announcement: Make) -> None:
    adapters = tuple(
        AdapterListing(name=f"{number:x}".rjust(64, "n"), digest=f"{number:032x}")
        for number in range(MAX_HOSTED_ADAPTERS)
    )
    announcement = make_announcement(adapters=adapters)
    known = announcement.model_dump(include={"peer_id", "model_fingerprint", "expires_at_s"})
    assert read(announcement.to_bytes(), **known) == announcement
    assert len(announcement.to_bytes()) < MAX_ANNOUNCEMENT_BYTES / 2
    with pytest.raises(ValidationError):
        make_announcement(adapters=(*adapters, adapters[0]))


def test_where_a_server_is_about_to_move_survives_the_wire(make_announcement: Make) -> None:
    announcement = make_announcement(next_start=1, next_end=3, movable=True, blocks_per_s=96.0)
    known = announcement.model_dump(include={"peer_id", "model_fingerprint", "expires_at_s"})
    assert read(announcement.to_bytes(), **known) == announcement
    assert announcement.next_blocks == BlockRange(1, 3)


def test_names_of_a_newer_release_are_ignored(make_announcement: Make) -> None:
    field_100 = b"\xa2\x06\x04blue"
    assert read(make_announcement().to_bytes() + field_100).server_name == "a server"


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 4, "end": 4}, {"start": -1}, {"end": 5}, {"start": "0"}, {"num_model_blocks": 0}, {"hidden_size": 0},
        {"server_name": "\x1b[2J"}, {"server_name": "x" * 65}, {"server_name": "two\nlines"}, {"model_name": ""},
        {"direct": ["unix:/var/run/docker.sock"]}, {"direct": ["unix:123"]}, {"direct": ["dns:443"]},
        {"direct": ["a b:1"]}, {"direct": ["host:0"]}, {"direct": ["host:65536"]}, {"direct": ["host:1"] * 9},
        {"direct": "host:1"}, {"multiaddrs": ["nonsense"]}, {"multiaddrs": ["/ip4/1.2.3.4/tcp/1,/ip4/1.1.1.1"]},
        {"dtype": "int4"}, {"state": "asleep"}, {"tls_certificate": b"x" * 4097}, {"peer_id": "../../etc/passwd"},
        {"decode_tokens_per_s": float("nan")}, {"forward_tokens_per_s": -1.0}, {"expires_at_s": float("inf")},
        {"cache_free_tokens": -1}, {"max_batch_size": True}, {"protocol_version": 0},
    ],
)  # fmt: skip
def test_announcement_refuses_what_no_server_should_say(make_announcement: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_announcement(**changes)


@pytest.mark.parametrize("direct", ["192.0.2.1:443", "[2001:db8::1]:443", "server1:31337", "a.example.org:1"])
def test_announcement_accepts_addresses_and_names(make_announcement: Make, direct: str) -> None:
    assert make_announcement(direct=[direct]).direct == [direct]


def test_announcement_that_readers_would_refuse_is_not_written(make_announcement: Make) -> None:
    large = make_announcement(tls_certificate=b"x" * 4096, multiaddrs=["/" + "a" * 255] * 16)
    with pytest.raises(BadRequest, match=str(MAX_ANNOUNCEMENT_BYTES)):
        large.to_bytes()


@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data + b"\x00")


def test_oversized_record_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        read(b" " * (MAX_ANNOUNCEMENT_BYTES + 1))


NUMBERS = st.integers(0, 2**32 - 1) | st.floats(width=32) | st.text(max_size=20) | st.binary(max_size=200)
CHANGES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=20))


@settings(max_examples=100)
@given(data=st.data())
def test_any_changed_field_is_read_or_refused(data: st.DataObject) -> None:
    entry = directory_pb2.ServerEntry(
        protocol_version=1, software_version="1", model_name="m", num_model_blocks=4, hidden_size=8, end=4, dtype=1,
        state=2, tls_certificate=b"\0\0\0", decode_tokens_per_s=1.0, forward_tokens_per_s=1.0, max_session_tokens=1,
    )  # fmt: skip
    assert read(entry.SerializeToString()).tls_certificate == b"\0\0\0"
    name = data.draw(st.sampled_from(sorted(entry.DESCRIPTOR.fields_by_name)))
    with contextlib.suppress(ProtocolError, TypeError, ValueError):  # what protobuf itself cannot write
        changed = directory_pb2.ServerEntry(**{name: data.draw(CHANGES)})
        entry.ClearField(name)
        entry.MergeFrom(changed)
        read(entry.SerializeToString())


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": [directory_pb2.HostedAdapter(name="two words", digest=bytes(16))]},
        {"adapters": [directory_pb2.HostedAdapter(name="poet", digest=bytes(15))]},
        {"state": 0}, {"state": 9}, {"dtype": 4}, {"dtype": 77}, {"coordinates": [0.1]}, {"coordinates": [9, 0, 0, 0]},
        {"coordinates": [float("nan")] * 4}, {"tls_certificate": b"\x09" * 97}, {"end": 0}, {"num_model_blocks": 0},
    ],
)  # fmt: skip
def test_entries_that_no_server_writes_are_refused(make_announcement: Make, changes: dict[str, Any]) -> None:
    entry = directory_pb2.ServerEntry.FromString(make_announcement().to_bytes())
    for name in changes:
        entry.ClearField(name)
    entry.MergeFrom(directory_pb2.ServerEntry(**changes))
    with pytest.raises(ProtocolError):
        read(entry.SerializeToString())
