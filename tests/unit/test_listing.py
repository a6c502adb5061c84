"""Which entries of the directory count, by whose clock, and which bucket is read next."""

from __future__ import annotations

import pytest

from swarm.buckets import FANOUT, LIKELY_FULL, Bucket, path_of_server
from swarm.listing import MAX_BUCKETS, MAX_COST_BYTES, MAX_UNREAD_S, Entry, Listing, Page

ROOT = Bucket("tree")
LIFETIME_S = 60.0
NUM_BLOCKS = 32


def entry(peer: str, written_at_s: float, lifetime_s: float = LIFETIME_S) -> Entry:
    return Entry(peer, written_at_s, lifetime_s, peer.encode())


def make_listing() -> Listing[str]:
    return Listing(ROOT, lambda each, _: each.peer_id)


def see(listing: Listing[str], now_s: float, *entries: Entry, bucket: Bucket = ROOT, skew_s: float = 0.0) -> bool:
    page = Page(entries, 400 * len(entries))
    return listing.observe(bucket, page, now_s=now_s, swarm_now_s=now_s + skew_s)


def full(now_s: float, name: str = "") -> list[Entry]:
    return [entry(f"{name}{number}", now_s) for number in range(LIKELY_FULL)]


def test_an_entry_counts_for_its_lifetime():
    listing = make_listing()
    see(listing, 100, entry("a", 90), entry("b", 100))
    assert listing.live(100) == ["a", "b"]
    see(listing, 151, entry("a", 90), entry("b", 100))
    assert listing.live(151) == ["b"]


def test_an_entry_that_had_ended_when_it_was_found_does_not_count():
    listing = make_listing()
    see(listing, 100, entry("a", 30))
    assert listing.live(100) == []


@pytest.mark.parametrize("skew_s", [-280.0, -61.0, 61.0, 280.0])
def test_a_writer_whose_clock_is_off_counts_from_its_second_entry_on_and_ends_with_its_last(skew_s):
    listing = make_listing()
    see(listing, 100, entry("a", 95 + skew_s))
    see(listing, 115, entry("a", 110 + skew_s))
    assert listing.live(115) == ["a"]
    see(listing, 176, entry("a", 110 + skew_s))
    assert listing.live(176) == []


def test_a_clock_in_the_future_makes_nobody_immortal():
    listing = make_listing()
    for now_s in range(100, 160, 15):
        see(listing, now_s, entry("a", 10_000))
        assert listing.live(now_s) == ["a"]
    see(listing, 161, entry("a", 10_000))
    assert listing.live(161) == []


def test_what_was_taken_back_stays_away_whatever_an_older_page_says():
    listing = make_listing()
    see(listing, 100, entry("a", 100))
    see(listing, 110, entry("a", 110, lifetime_s=0.0))
    assert listing.live(110) == []
    see(listing, 111, entry("a", 100))
    assert listing.live(111) == []
    see(listing, 112, entry("a", 112))
    assert listing.live(112) == ["a"]


def test_a_server_that_moved_counts_where_it_wrote_last():
    listing = make_listing()
    see(listing, 100, *full(100), entry("a", 100))
    below = ROOT.below()[3]
    see(listing, 110, entry("a", 110), bucket=below)
    see(listing, 161, *full(160), entry("a", 100))
    assert "a" in listing.live(161)


def test_what_was_not_read_again_is_believed_for_a_while():
    listing = make_listing()
    see(listing, 100, entry("a", 100))
    assert listing.live(160 + MAX_UNREAD_S / 2) == ["a"]
    assert listing.live(160 + MAX_UNREAD_S) == []


def test_a_page_from_a_node_that_is_no_longer_written_to_says_nothing():
    listing = make_listing()
    assert see(listing, 1000, entry("a", 1000))
    assert not see(listing, 1065, entry("a", 900))
    assert listing.live(1065) == ["a"]


def test_buckets_below_are_read_when_one_may_be_full():
    listing = make_listing()
    see(listing, 100, *full(100)[1:])
    assert listing.plan(max_bytes=1e9, since_s=101) == [ROOT]
    see(listing, 102, *full(102))
    assert set(listing.plan(max_bytes=1e9, since_s=101)) == set(ROOT.below())


def test_what_was_read_longest_ago_is_read_next_within_the_budget():
    listing = make_listing()
    see(listing, 100, *full(100))
    for number, bucket in enumerate(ROOT.below()):
        see(listing, 101 + number, entry(f"x{number}", 101), bucket=bucket)
    planned = listing.plan(max_bytes=14_000, since_s=200)
    assert planned == [ROOT, *ROOT.below()[:3]]  # 32 entries, and one each
    assert listing.plan(max_bytes=0, since_s=200) == []


def test_where_servers_of_missing_blocks_may_be_is_read_first():
    listing = make_listing()
    see(listing, 100, *full(100))
    planned = listing.plan(max_bytes=1e9, since_s=200, blocks=[20], num_model_blocks=NUM_BLOCKS)
    assert [bucket.digits for bucket in planned[:4]] == [(10,), (), (9,), (8,)]
    assert path_of_server("a", 20, NUM_BLOCKS)[0] == 10


def test_a_flood_makes_a_reader_read_no_more_than_it_may():
    listing = make_listing()
    now_s = 100.0
    for _ in range(200):
        now_s += 15
        planned = listing.plan(max_bytes=30_000, since_s=now_s)
        assert len(planned) <= 30_000 / 400
        for bucket in planned:
            see(listing, now_s, *full(now_s, name=bucket.key), bucket=bucket)
    assert len(listing._states) == MAX_BUCKETS
    assert len(listing._seen) <= MAX_BUCKETS * LIKELY_FULL


def test_a_bucket_of_oversized_entries_is_read_too():
    listing = make_listing()
    listing.observe(ROOT, Page((), 10 * MAX_COST_BYTES), now_s=100, swarm_now_s=100)
    assert listing.plan(max_bytes=MAX_COST_BYTES, since_s=101) == [ROOT]
    assert len(ROOT.below()) == FANOUT
