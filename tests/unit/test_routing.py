"""Routes: contiguous, inside what each server holds, the cheapest there is; and gaps explained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import FINGERPRINT, announcement, peer_id
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import PROTOCOL_VERSION
from swarm.announcement import AdapterListing, Announcement
from swarm.client.hosted import choose_adapter
from swarm.client.routing import HOP_COST_S, TUNNEL_COST_S, Hop, Needs, Roster, View, explain, route_costs
from swarm.client.routing import plan_route as plan_route_of
from swarm.coordinates import Coordinates
from swarm.errors import BadRequest, NoRoute, PromptTooLong
from swarm.ranges import BlockRange

ALL = Needs(BlockRange(0, 12), FINGERPRINT)


def plan_route(servers: list[Announcement], needs: Needs, view: View | None = None, **options: str) -> list[Hop]:
    return plan_route_of(Roster(servers), needs, view, **options)


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
        plan_route([short, announcement("B", 0, 12)], needs, View(avoid={peer_id("B")}))


def test_a_session_that_no_server_allows_is_refused_rather_than_waited_for():
    needs = Needs(BlockRange(0, 12), FINGERPRINT, session_tokens=100)
    servers = [announcement("A", 0, 6, max_session_tokens=200), announcement("B", 6, 12, max_session_tokens=99)]
    with pytest.raises(PromptTooLong, match="100 tokens was asked for, the servers of this model allow 99"):
        plan_route(servers, needs)
    with pytest.raises(NoRoute, match="blocks 6-11"):
        plan_route(servers[:1], needs)


def test_avoided_peers_are_left_out_and_counted():
    servers = [announcement("A", 0, 12), announcement("B", 0, 12)]
    assert described(plan_route(servers, ALL, View(avoid={peer_id("A")}))) == [("B", 0, 12)]
    with pytest.raises(NoRoute, match="2 known servers failed a moment ago"):
        plan_route(servers, ALL, View(avoid={peer_id("A"), peer_id("B")}))


def test_near_servers_are_preferred_and_what_was_measured_counts_more_than_places():
    here, near, far = Coordinates(0, 0, 0.01), Coordinates(0.01, 0, 0.01), Coordinates(0.2, 0, 0.01)
    servers = [announcement("A", 0, 12, coordinates=far), announcement("B", 0, 12, coordinates=near)]
    assert described(plan_route(servers, ALL, View(here=here))) == [("B", 0, 12)]
    assert described(plan_route(servers, ALL, View(here=here, rtts_s={peer_id("B"): 0.5}))) == [("A", 0, 12)]


def test_a_session_stays_in_one_region_and_a_batch_near_the_client():
    here, there = Coordinates(0, 0, 0.001), Coordinates(0.1, 0, 0.001)
    near = [announcement("A", 0, 6, coordinates=here), announcement("B", 6, 12, coordinates=here)]
    # Six times as fast, at a distance: worth one way there and back, but not the way after every hop.
    fast = {"coordinates": there, "decode_tokens_per_s": 20.0, "forward_tokens_per_s": 1000.0}
    far = [announcement("C", 0, 4, **fast), announcement("D", 4, 8, **fast), announcement("E", 8, 12, **fast)]
    slow = [each.model_copy(update={"decode_tokens_per_s": 5.0, "forward_tokens_per_s": 250.0}) for each in near]
    view = View(here=here)
    assert [name for name, _, _ in described(plan_route(slow + far, ALL, view))] == ["C", "D", "E"]
    batch = replace(ALL, batch_tokens=20, batch_size=1)
    assert [name for name, _, _ in described(plan_route(slow + far, batch, view))] == ["A", "B"]


def test_slow_peers_full_caches_and_tunnels_are_worth_a_detour():
    servers = [announcement("A", 0, 12), announcement("B", 0, 6), announcement("C", 6, 12)]
    assert len(plan_route(servers, ALL)) == 1
    assert len(plan_route(servers, ALL, View(slowness={peer_id("A"): 10.0}))) == 2
    full = servers[0].model_copy(update={"cache_free_tokens": 10})
    assert len(plan_route([full, *servers[1:]], replace(ALL, session_tokens=100))) == 2
    hidden = servers[0].model_copy(update={"direct": []})
    assert len(plan_route([hidden, *servers[1:]], ALL)) == 2
    assert len(plan_route([full], replace(ALL, session_tokens=100))) == 1


@pytest.mark.parametrize("rate", [1e-300, 1e-40, 1e12])
def test_whatever_a_server_announces_all_costs_are_numbers(rate):
    rates = {"decode_tokens_per_s": rate, "forward_tokens_per_s": rate}
    servers = [announcement("A", 0, 12), announcement("B", 4, 12, **rates)]
    for needs in (ALL, replace(ALL, batch_tokens=100, batch_size=1)):
        hops = plan_route(servers, needs)
        assert len(hops) == (1 if rate < 1 else 2)
        assert all(0 < cost.total_s < 1e6 for cost in route_costs(hops, needs))


def test_a_cache_that_is_full_of_this_session_does_not_matter():
    needs = replace(ALL, session_tokens=100)
    servers = [announcement("A", 0, 12, cache_free_tokens=0), announcement("B", 0, 6), announcement("C", 6, 12)]
    assert len(plan_route(servers, needs)) == 2
    assert len(plan_route(servers, needs, View(holding={peer_id("A")}))) == 1
    twins = [announcement(name, 0, 12, forward_tokens_per_s=rate) for name, rate in (("A", 5000.0), ("B", 1000.0))]
    assert described(plan_route(twins, needs.fed(90, 1))) == [("A", 0, 12)]
    assert described(plan_route(twins, needs.fed(90, 1), View(holding={peer_id("B")}))) == [("B", 0, 12)]


def test_batches_go_where_there_is_less_to_do():
    servers = [announcement("A", 0, 12), announcement("B", 0, 12, forward_tokens_per_s=500.0)]
    batch = replace(ALL, batch_tokens=100, batch_size=1)
    assert described(plan_route(servers, batch)) == [("A", 0, 12)]
    assert described(plan_route(servers, batch, View(tokens_under_way={peer_id("A"): 99}))) == [("A", 0, 12)]
    assert described(plan_route(servers, batch, View(tokens_under_way={peer_id("A"): 101}))) == [("B", 0, 12)]


def test_the_costs_of_a_route_are_those_that_it_was_chosen_for():
    here = Coordinates(0, 0, 0.01)
    servers = [announcement("A", 0, 6, coordinates=here), announcement("B", 6, 12, coordinates=here, direct=[])]
    unmeasured = View(here=here, rtts_s={peer_id("A"): 0.1})
    _, second = route_costs(plan_route(servers, ALL, unmeasured), ALL, unmeasured)
    assert second.network_s == pytest.approx(0.01 + HOP_COST_S + TUNNEL_COST_S + 0.01)
    view = View(here=here, rtts_s={peer_id("A"): 0.1, peer_id("B"): 0.2})
    first, second = route_costs(plan_route(servers, ALL, view), ALL, view)
    assert first.network_s == pytest.approx(0.05 + HOP_COST_S)
    assert second.network_s == pytest.approx(0.01 + HOP_COST_S + 0.1), "what was measured went through the tunnel"
    assert first.compute_s == second.compute_s == pytest.approx(0.01)
    batch = replace(ALL, batch_tokens=100, batch_size=1)
    first, second = route_costs(plan_route(servers, batch, view), batch, view)
    assert first.network_s == pytest.approx(0.1 + HOP_COST_S) and first.compute_s == pytest.approx(0.1)
    assert second.network_s == pytest.approx(0.2 + HOP_COST_S)


def test_a_server_where_steps_wait_is_worth_a_detour_by_what_it_said_last():
    servers = [announcement("A", 0, 12, queue_s=0.3), announcement("B", 0, 6), announcement("C", 6, 12)]
    assert len(plan_route(servers, ALL)) == 2
    assert len(plan_route(servers, ALL, View(queues_s={peer_id("A"): 0.0}))) == 1
    assert len(plan_route(servers, ALL, View(queues_s={peer_id("A"): 0.0, peer_id("B"): 0.3}))) == 1
    (cost,) = route_costs([Hop(servers[0], BlockRange(0, 12))], ALL)
    assert cost.queue_s == pytest.approx(0.3)


def test_a_long_prompt_goes_where_prompts_are_fast_and_a_short_one_where_steps_are():
    """Of a session of which many steps are expected, both count."""
    servers = [
        announcement("A", 0, 12, decode_tokens_per_s=100.0, forward_tokens_per_s=200.0),
        announcement("B", 0, 12, decode_tokens_per_s=50.0, forward_tokens_per_s=5000.0),
    ]
    session = replace(ALL, session_tokens=2048)
    assert described(plan_route(servers, session.fed(6, 1))) == [("A", 0, 12)]
    assert described(plan_route(servers, session.fed(1000, 1))) == [("B", 0, 12)]
    assert described(plan_route(servers, session.fed(40, 8))) == [("B", 0, 12)]


def test_a_long_prompt_goes_over_lines_that_carry_much():
    wide, narrow = 12.5e6, 0.25e6
    first = [announcement("A", 0, 6, bytes_per_s=narrow), announcement("B", 0, 6, bytes_per_s=wide, queue_s=0.01)]
    servers = [each.model_copy(update={"hidden_size": 4096}) for each in (*first, announcement("C", 6, 12))]
    session = replace(ALL, session_tokens=2048)
    assert described(plan_route(servers, session.fed(6, 1)))[0][0] == "A"
    assert described(plan_route(servers, session.fed(1000, 1)))[0][0] == "B"
    ours = View(bytes_per_s={peer_id("B"): narrow / 10}, line_bytes_per_s=wide)
    assert described(plan_route(servers, session.fed(1000, 1), ours))[0][0] == "A"


def test_a_cache_must_have_room_for_all_sequences_of_a_session():
    servers = [announcement("A", 0, 12, cache_free_tokens=1000), announcement("B", 0, 6), announcement("C", 6, 12)]
    session = replace(ALL, session_tokens=300)
    assert len(plan_route(servers, session.fed(1, 3))) == 1
    assert len(plan_route(servers, session.fed(1, 4))) == 2


def test_an_explanation_shows_queue_room_and_way_and_the_next_best_route():
    roster = Roster([announcement("A", 0, 12, queue_s=0.002), announcement("B", 0, 12, direct=[])])
    hops = plan_route_of(roster, ALL)
    text = str(explain(hops, roster, ALL, View(), {peer_id("A"): "through relay R"}))
    assert "queue      2.0 ms" in text and "room for 10000 tokens" in text and "through relay R" in text
    assert "next best: 0:12 at server-B" in text
    alone = Roster(roster.servers[:1])
    assert "next best" not in str(explain(hops, alone, ALL, View())) and "direct" in str(
        explain(hops, alone, ALL, View())
    )


def cheapest_s(servers: list[Announcement], needs: Needs, view: View, taken: tuple[Hop, ...] = ()) -> float:
    """Try every way to cut the blocks into hops."""
    start = taken[-1].blocks.end if taken else needs.blocks.start
    if start == needs.blocks.end:
        return sum(cost.total_s for cost in route_costs(taken, needs, view))
    ways = [
        cheapest_s(servers, needs, view, (*taken, Hop(server, BlockRange(start, stop))))
        for server in servers
        if server.start <= start < server.end and not (taken and taken[-1].server is server)
        for stop in range(start + 1, min(server.end, needs.blocks.end) + 1)
    ]
    return min(ways, default=float("inf"))


spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(sorted).filter(lambda span: span[0] < span[1])
places = st.builds(Coordinates, st.floats(-0.1, 0.1), st.floats(-0.1, 0.1), st.floats(0, 0.02))
kinds = st.tuples(
    spans, st.sampled_from([0.0, 5.0, 50.0, 500.0]), st.none() | places, st.sampled_from([1.0, 8.0]),
    st.sampled_from([0.0, 1e3, 1e5]), st.sampled_from([0.0, 0.03]),
)  # fmt: skip


@given(st.lists(kinds, max_size=4), spans, st.sampled_from([0, 100]), st.none() | places)
@settings(max_examples=150, deadline=None)
def test_every_route_is_valid_and_as_cheap_as_the_best_of_all(kinds, wanted, batch_tokens, here):
    servers = [
        announcement(
            name, start, end, decode_tokens_per_s=rate, forward_tokens_per_s=10 * rate,
            coordinates=place if here is not None else None, bytes_per_s=line, queue_s=queue_s,
        )
        for name, ((start, end), rate, place, _, line, queue_s) in zip("ABCD", kinds, strict=False)
    ]  # fmt: skip
    if any(server.coordinates is None for server in servers):  # the triangle inequality holds for places alone
        servers = [server.model_copy(update={"coordinates": None}) for server in servers]
    slowness = {server.peer_id: kind[3] for server, kind in zip(servers, kinds, strict=True)}
    needs = Needs(BlockRange(*wanted), FINGERPRINT, batch_tokens=batch_tokens, batch_size=int(batch_tokens > 0))
    needs = needs if batch_tokens else replace(needs, session_tokens=64).fed(32, 1)
    view = View(here=here, slowness=slowness)
    best_s = cheapest_s(servers, needs, view)
    try:
        hops = plan_route(servers, needs, view)
    except NoRoute:
        assert best_s == float("inf")
        return
    assert [hop.blocks.start for hop in hops] == [wanted[0], *(hop.blocks.end for hop in hops[:-1])]
    assert hops[-1].blocks.end == wanted[1]
    assert all(hop.server.blocks.covers(hop.blocks) for hop in hops)
    assert sum(cost.total_s for cost in route_costs(hops, needs, view)) == pytest.approx(best_s, rel=1e-3)


# Adapters that servers host

POET, OTHER_POET = (AdapterListing(name="poet", digest=digit * 32) for digit in "ab")
HOSTING = [
    announcement("A", 0, 12),
    announcement("B", 0, 8, adapters=(POET,)),
    announcement("C", 4, 12, adapters=(OTHER_POET,)),
    announcement("D", 8, 12, adapters=(POET,)),
]


def test_a_route_takes_servers_of_one_adapter_only():
    assert described(plan_route(HOSTING, ALL)) == [("A", 0, 12)]
    assert described(plan_route(HOSTING, replace(ALL, adapter=POET))) == [("B", 0, 8), ("D", 8, 12)]
    with pytest.raises(NoRoute) as caught:
        plan_route(HOSTING, replace(ALL, adapter=OTHER_POET))
    assert str(caught.value) == (
        "the adapter poet@bbbbbbbb is not served for blocks 0-3 of 0:12 (2 known servers with another adapter 'poet'; "
        "1 known server with no adapter 'poet'); servers that have it: 4:12 at server-C (QQQQQQQC)"
    )


def test_a_name_means_the_adapter_that_is_served_for_most_blocks():
    blocks = ALL.blocks
    assert choose_adapter(HOSTING, "poet", blocks) == POET
    assert choose_adapter(HOSTING[:3], "poet", BlockRange(6, 12)) == OTHER_POET
    assert choose_adapter([*HOSTING, announcement("E", 0, 12, adapters=(OTHER_POET,))], "poet", blocks) == OTHER_POET
    assert choose_adapter(HOSTING, "poet@BB", blocks) == OTHER_POET
    for wanted in ("bard", "poet@c", ""):
        with pytest.raises(BadRequest, match=f"hosts an adapter '{wanted}': they host poet@aaaaaaaa, poet@bbbbbbbb$"):
            choose_adapter(HOSTING, wanted, blocks)
    with pytest.raises(BadRequest, match="they host none$"):
        choose_adapter(HOSTING[:1], "poet", blocks)


def test_as_many_routes_can_share_a_batch_as_the_block_with_the_fewest_servers_allows():
    servers = [announcement("A", 0, 12), announcement("B", 0, 6), announcement("C", 6, 12), announcement("D", 4, 8)]
    roster, batch = Roster(servers), replace(ALL, batch_tokens=100, batch_size=1)
    assert roster.num_routes(batch, ()) == 2
    assert roster.num_routes(replace(batch, blocks=BlockRange(5, 7)), ()) == 3
    assert roster.num_routes(batch, {peer_id("A")}) == 1 and roster.num_routes(batch, set(map(peer_id, "AB"))) == 0
    assert Roster().num_routes(batch, ()) == 0


def test_batches_are_shared_by_what_was_measured_of_batches():
    servers = [announcement("A", 0, 12), announcement("B", 0, 12, forward_tokens_per_s=900.0)]
    batch, slow = replace(ALL, batch_tokens=100, batch_size=1), {peer_id("A"): 2.0}
    assert described(plan_route(servers, batch, View(slowness=slow))) == [("A", 0, 12)]
    assert described(plan_route(servers, batch, View(batch_slowness=slow))) == [("B", 0, 12)]
    assert described(plan_route(servers, ALL, View(batch_slowness=slow))) == [("A", 0, 12)]


def test_a_roster_that_follows_another_one_knows_the_same_as_one_made_anew():
    place = Coordinates(0.01, 0.02, 0.003)
    before = [announcement(name, 0, 12, queue_s=0.1) for name in "ABCD"]
    roster = Roster(before)
    assert plan_route_of(roster, ALL)
    changed = announcement("B", 3, 9, coordinates=place, direct=[])
    after = [before[3], changed, announcement("E", 0, 12, model_fingerprint="e" * 32), before[0]]
    following, anew = Roster(after, before=roster), Roster(after)
    for needs in (ALL, replace(ALL, batch_tokens=100, batch_size=1)):
        assert list(following.usable(needs, ())) == list(anew.usable(needs, ())) == [0, 1, 2]
        assert plan_route_of(following, needs) == plan_route_of(anew, needs)
    columns = [name for name, value in vars(anew).items() if isinstance(value, np.ndarray)]
    assert len(columns) > 12
    assert all((getattr(following, name) == getattr(anew, name)).all() for name in columns)
