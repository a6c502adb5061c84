from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swarm.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement
from swarm.errors import BadRequest, ProtocolError
from swarm.ranges import BlockRange

Make = Callable[..., Announcement]


def test_announcement_survives_the_wire(make_announcement: Make) -> None:
    announcement = make_announcement(model_commit="abc", quantization="int8", multiaddrs=["/ip4/127.0.0.1/tcp/1"])
    assert Announcement.from_bytes(announcement.to_bytes()) == announcement
    assert announcement.blocks == BlockRange(0, 4)
    assert len(announcement.to_bytes()) < 1500


def test_names_of_a_newer_release_are_ignored(make_announcement: Make) -> None:
    fields = json.loads(make_announcement().to_bytes()) | {"colour": "blue"}
    assert Announcement.from_bytes(json.dumps(fields).encode()).server_name == "a server"


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
        Announcement.from_bytes(data)


def test_oversized_record_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        Announcement.from_bytes(b" " * (MAX_ANNOUNCEMENT_BYTES + 1))


@settings(max_examples=50)
@given(data=st.data())
def test_any_changed_field_is_read_or_refused(data: st.DataObject) -> None:
    good = {
        "protocol_version": 1, "software_version": "1", "peer_id": "Q" * 46, "server_name": "", "model_name": "m",
        "model_fingerprint": "f", "num_model_blocks": 4, "hidden_size": 8, "start": 0, "end": 4, "dtype": "float32",
        "state": "online", "direct": [], "tls_certificate": "AAAA", "multiaddrs": [], "decode_tokens_per_s": 1.0,
        "forward_tokens_per_s": 1.0, "max_session_tokens": 1, "max_step_tokens": 1, "max_batch_tokens": 1,
        "max_batch_size": 1, "cache_free_tokens": 1, "expires_at_s": 1.0,
    }  # fmt: skip
    assert Announcement.from_bytes(json.dumps(good).encode()).tls_certificate == b"\0\0\0"
    name = data.draw(st.sampled_from(sorted(good)))
    atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    value = data.draw(st.recursive(atoms, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
    with contextlib.suppress(ProtocolError):
        Announcement.from_bytes(json.dumps(good | {name: value}).encode())
