"""Ends of a request that are for trusted servers: no route gives them to others, whatever servers there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import FINGERPRINT, announcement, peer_id
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.announcement import Announcement
from swarm.client.config import ClientConfig
from swarm.client.routing import Needs, Roster, View, explain, plan_route
from swarm.client.trust import Trust
from swarm.errors import BadRequest, NoRoute, PromptTooLong
from swarm.ranges import BlockRange

ALL = BlockRange(0, 12)


def trusting(names: str, num_blocks: int | None = None, **changes: object) -> Needs:
    trust = Trust(servers=frozenset(map(peer_id, names)), num_blocks=num_blocks)
    return replace(Needs(ALL, FINGERPRINT, trust=trust), **changes)


def described(servers: list[Announcement], needs: Needs, view: View | None = None, prefer: str = "") -> str:
    hops = plan_route(Roster(servers), needs, view, prefer=prefer)
    return " ".join(f"{hop.peer_id[-1]}{hop.blocks}" for hop in hops)


FAST = {"decode_tokens_per_s": 1e6, "forward_tokens_per_s": 1e6}
SERVERS = [
    announcement("A", 0, 3), announcement("B", 8, 12), announcement("C", 0, 2), announcement("F", 0, 12, **FAST),
]  # fmt: skip


def test_by_default_trusted_servers_run_their_whole_spans_at_both_ends():
    assert described(SERVERS, Needs(ALL, FINGERPRINT)) == "F0:12"
    assert described(SERVERS, trusting("AB")) == "A0:3 F3:8 B8:12"
    assert described(SERVERS, trusting("ABC")).startswith("A0:3"), "as far as the one that reaches furthest"


def test_so_many_blocks_at_both_ends_as_the_user_says_are_for_trusted_servers():
    assert described(SERVERS, trusting("AB", 1)) == "A0:1 F1:11 B11:12"
    assert described(SERVERS, trusting("AB", 3)) == "A0:3 F3:9 B9:12"
    with pytest.raises(NoRoute, match=r"trusted_servers is available for the first blocks of 0:12: block 3 is missing"):
        described(SERVERS, trusting("AB", 4))
    assert described(SERVERS, trusting("F", 100)) == "F0:12"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("A", "available for the last blocks of 0:12: block 11 is missing .2 known servers is not named in trusted"),
        ("B", "available for the first blocks of 0:12: block 0 is missing"),
        ("", "available for the first and the last blocks of 0:12: blocks 0, 11 are missing"),
        ("Z", "available for the first and the last blocks of 0:12: blocks 0, 11 are missing"),
    ],
)
def test_the_end_that_lacks_a_trusted_server_is_named(names, sentence):
    with pytest.raises(NoRoute, match=sentence):
        described(SERVERS, trusting(names))


def test_a_trusted_server_that_failed_is_waited_for_and_one_for_short_sessions_is_told():
    with pytest.raises(NoRoute, match="the first blocks.*1 known server failed a moment ago; 2 known servers is not"):
        described(SERVERS, trusting("AB"), View(avoid={peer_id("A")}))
    with pytest.raises(PromptTooLong, match="5000 tokens"):
        described([*SERVERS, announcement("D", 0, 12, max_session_tokens=9000)], trusting("AB", session_tokens=5000))


def test_a_part_of_a_request_has_the_ends_of_the_whole_one():
    middle = trusting("AB", blocks=BlockRange(3, 8), part_of=ALL)
    assert described(SERVERS, middle) == "F3:8"
    assert described(SERVERS, replace(middle, blocks=BlockRange(3, 12))) == "F3:8 B8:12"
    assert described(SERVERS, middle, prefer=peer_id("F")) == "F3:8"
    for blocks in (BlockRange(0, 3), BlockRange(2, 5), BlockRange(8, 12)):  # a hop that failed is not asked for there
        hops = described(SERVERS, replace(middle, blocks=blocks), prefer=peer_id("F"))
        assert hops[0] == "B" if blocks.end == 12 else hops[0] == "A"
    with pytest.raises(NoRoute, match="the first and the last blocks of 3:8"):
        described(SERVERS, trusting("AB", blocks=BlockRange(3, 8)))


def test_explained_routes_say_who_is_trusted():
    roster, needs = Roster(SERVERS), trusting("AB")
    text = str(explain(plan_route(roster, needs), roster, needs, View()))
    assert "trusted servers run all blocks before 3 and from 8 on: 0:3 at server-A" in text
    assert "8:12 at server-B" in text.splitlines()[-1]


@pytest.mark.parametrize("settings", [{"trusted_blocks": 3}, {"trusted_servers": [], "trusted_blocks": 0}])
def test_a_number_of_blocks_that_would_mean_nothing_is_refused(settings):
    with pytest.raises(BadRequest, match="trusted_blocks"):
        ClientConfig(initial_peers=("/ip4/127.0.0.1/tcp/1",), **settings)


def ends_of(needs: Needs, trusted: list[Announcement]) -> set[int]:
    """The blocks that are for trusted servers, found by looking at each block by itself."""
    assert needs.trust is not None
    whole, number = needs.whole, needs.trust.num_blocks
    if number is not None:
        return {*list(whole)[:number], *list(whole)[-number:]}
    at_first = [set(server.blocks) for server in trusted if whole.start in server.blocks]
    at_last = [set(server.blocks) for server in trusted if whole.end - 1 in server.blocks]
    return {whole.start, whole.end - 1}.union(*at_first, *at_last) & set(whole)


spans = st.tuples(st.integers(0, 11), st.integers(1, 12)).map(sorted).filter(lambda span: span[0] < span[1])


@given(
    st.lists(st.tuples(spans, st.sampled_from([1.0, 100.0, 1e5])), max_size=10),
    st.sets(st.sampled_from("ABCDEFGHJK")), st.none() | st.integers(1, 12), spans, spans,
    st.sets(st.sampled_from("ABCDEFGHJK"), max_size=3), st.sampled_from(["", *"ABCDEF"]), st.sampled_from([0, 64]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_route_gives_an_end_to_a_server_that_is_not_trusted(
    kinds, names, num_blocks, wanted, part, avoid, prefer, batch_tokens
):
    servers = [
        announcement(name, start, end, decode_tokens_per_s=rate, forward_tokens_per_s=rate)
        for name, ((start, end), rate) in zip("ABCDEFGHJK", kinds, strict=False)
    ]
    whole = BlockRange(*wanted)
    start, end = max(part[0], whole.start), min(part[1], whole.end)
    blocks = BlockRange(start, end) if start < end else whole
    needs = trusting(
        "".join(names),
        num_blocks,
        blocks=blocks,
        part_of=whole,
        batch_tokens=batch_tokens,
        batch_size=min(1, batch_tokens),
    )
    view = View(avoid=set(map(peer_id, avoid)))
    there = [server for server in servers if server.peer_id not in view.avoid]
    trusted = [server for server in there if needs.trusts(server.peer_id)]
    ends = ends_of(needs, trusted)
    may_run = {
        block: [server for server in there if block in server.blocks and (block not in ends or server in trusted)]
        for block in blocks
    }
    try:
        hops = plan_route(Roster(servers), needs, view, prefer=peer_id(prefer) if prefer else "")
    except NoRoute:
        assert not all(may_run.values()), "there is a route, and it was not found"
        return
    assert [block for hop in hops for block in hop.blocks] == list(blocks)
    assert all(hop.server in may_run[block] for hop in hops for block in hop.blocks)
