"""Routes: contiguous, inside what each server holds, the cheapest there is; and gaps explained."""

from __future__ import annotations

import pytest
from fakes import FINGERPRINT, announcement, peer_id
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import PROTOCOL_VERSION
from swarm.announcement import Announcement
from swarm.client.routing import HOP_COST_S, Hop, Needs, plan_route
from swarm.errors import NoRoute, PromptTooLong
from swarm.ranges import BlockRange

ALL = Needs(BlockRange(0, 12), FINGERPRINT)


def described(hops: list[Hop]) -> list[tuple[str, int, int]]:
    return [(hop.peer_id[-1], hop.blocks.start, hop.blocks.end) for hop in hops]


def test_servers_side_by_side_make_a_route():
    servers = [announcement("C", 8, 12), announcement("A", 0, 4), announcement("B", 4, 8)]
    assert described(plan_route(servers, ALL)) == [("A", 0, 4), ("B", 4, 8), ("C", 8, 12)]


def test_overlapping_servers_are_used_in_part():
    hops = plan_route([announcement("A", 0, 8), announcement("B", 6, 12)], ALL)
    assert [name for name, _, _ in described(hops)] == ["A", "B"]
    assert 6 <= hops[0].blocks.end <= 8 and hops[0].blocks.end == hops[1].blocks.start


def test_a_range_inside_the_model_needs_only_its_servers():
    needs = Needs(BlockRange(5, 7), FINGERPRINT)
    assert described(plan_route([announcement("A", 4, 8)], needs)) == [("A", 5, 7)]


def test_fewer_hops_are_preferred_at_equal_speed():
    servers = [announcement("A", 0, 4), announcement("B", 4, 8), announcement("C", 8, 12), announcement("D", 0, 12)]
    assert described(plan_route(servers, ALL)) == [("D", 0, 12)]


def test_a_much_faster_peer_is_worth_a_hop():
    servers = [
        announcement("A", 0, 12, decode_tokens_per_s=1.0),
        announcement("B", 0, 6, decode_tokens_per_s=1000.0),
    ]
    assert described(plan_route(servers, ALL)) == [("B", 0, 6), ("A", 6, 12)]


def test_a_server_that_did_not_measure_its_speed_is_still_used():
    assert described(plan_route([announcement("A", 0, 12, decode_tokens_per_s=0.0)], ALL)) == [("A", 0, 12)]


def test_a_gap_is_named():
    with pytest.raises(NoRoute, match=r"blocks 4-7, 11 of 0:12.*swarm serve"):
        plan_route([announcement("A", 0, 4), announcement("B", 8, 11)], ALL)


def test_a_gap_of_one_block_is_named_in_the_singular():
    with pytest.raises(NoRoute, match="available for block 11 of 0:12"):
        plan_route([announcement("A", 0, 11)], ALL)


def test_no_servers_at_all():
    with pytest.raises(NoRoute, match="blocks 0-11 of 0:12"):
        plan_route([], ALL)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, f"speaks protocol version {PROTOCOL_VERSION + 1}"),
        ({"model_commit": "b" * 40}, "serves revision bbbbbbbbbbbb .ours is aaaaaaaaaaaa"),
        ({"state": "draining"}, "is draining"),
        ({"state": "joining"}, "is joining"),
        ({"model_fingerprint": "e" * 32}, "serves another model"),
    ],
)
def test_servers_that_cannot_be_used_are_left_out_and_counted_with_the_reason(changes, reason):
    needs = Needs(BlockRange(0, 12), FINGERPRINT, commit="a" * 40, session_tokens=100)
    servers = [announcement("A", 0, 12, **changes), announcement("B", 0, 6), announcement("C", 6, 12)]
    assert described(plan_route(servers, needs)) == [("B", 0, 6), ("C", 6, 12)]
    with pytest.raises(NoRoute, match=f"1 known server {reason}"):
        plan_route(servers[:1], needs)


def test_servers_for_shorter_sessions_are_left_out():
    needs = Needs(BlockRange(0, 12), FINGERPRINT, session_tokens=100)
    short = announcement("A", 0, 12, max_session_tokens=99)
    assert described(plan_route([short, announcement("B", 0, 6), announcement("C", 6, 12)], needs))[0][0] == "B"
    with pytest.raises(NoRoute, match="1 known server allows sessions of 99 tokens .we need 100"):
        plan_route([short, announcement("B", 0, 12)], needs, avoid={peer_id("B")})


def test_a_session_that_no_server_allows_is_refused_rather_than_waited_for():
    needs = Needs(BlockRange(0, 12), FINGERPRINT, session_tokens=100)
    servers = [announcement("A", 0, 6, max_session_tokens=200), announcement("B", 6, 12, max_session_tokens=99)]
    with pytest.raises(PromptTooLong, match="100 tokens was asked for, the servers of this model allow 99"):
        plan_route(servers, needs)
    with pytest.raises(NoRoute, match="blocks 6-11"):
        plan_route(servers[:1], needs)


def test_avoided_peers_are_left_out_and_counted():
    servers = [announcement("A", 0, 12), announcement("B", 0, 12)]
    assert described(plan_route(servers, ALL, avoid={peer_id("A")})) == [("B", 0, 12)]
    with pytest.raises(NoRoute, match="2 known servers failed a moment ago"):
        plan_route(servers, ALL, avoid={peer_id("A"), peer_id("B")})


def cost_s(hops: list[tuple[Announcement, int, int]]) -> float:
    return sum(
        HOP_COST_S + (end - start) / ((server.decode_tokens_per_s or 100.0) * (server.end - server.start))
        for server, start, end in hops
    )


def cheapest_s(servers: list[Announcement], start: int, end: int) -> float:
    """Try every way to cut [start, end) into hops."""
    if start == end:
        return 0.0
    ways = [
        cost_s([(server, start, stop)]) + cheapest_s(servers, stop, end)
        for server in servers
        if server.start <= start < server.end
        for stop in range(start + 1, min(server.end, end) + 1)
    ]
    return min(ways, default=float("inf"))


spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(sorted).filter(lambda span: span[0] < span[1])


@given(st.lists(st.tuples(spans, st.sampled_from([0.0, 5.0, 50.0, 500.0])), max_size=4), spans)
@settings(max_examples=150, deadline=None)
def test_every_route_is_valid_and_as_cheap_as_the_best_of_all(kinds, wanted):
    servers = [
        announcement(name, start, end, decode_tokens_per_s=rate)
        for name, ((start, end), rate) in zip("ABCD", kinds, strict=False)
    ]
    needs = Needs(BlockRange(*wanted), FINGERPRINT)
    best_s = cheapest_s(servers, *wanted)
    try:
        hops = plan_route(servers, needs)
    except NoRoute:
        assert best_s == float("inf")
        return
    assert [hop.blocks.start for hop in hops] == [wanted[0], *(hop.blocks.end for hop in hops[:-1])]
    assert hops[-1].blocks.end == wanted[1]
    assert all(hop.server.blocks.covers(hop.blocks) for hop in hops)
    assert cost_s([(hop.server, hop.blocks.start, hop.blocks.end) for hop in hops]) == pytest.approx(best_s)
