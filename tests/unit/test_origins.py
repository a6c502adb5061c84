"""Where there is no room, the address prefix that has most gives way; rates are kept per peer and per prefix."""

from __future__ import annotations

import pytest

from swarm.origins import RequestLimiter, RequestRates, Source, largest_share, who_gives_way
from swarm.prefixes import prefix_of, prefix_of_multiaddr


def test_the_newest_record_of_the_largest_prefix_leaves_for_one_of_another() -> None:
    records = {"a": "flood", "b": "honest", "c": "flood", "d": "flood"}
    assert who_gives_way(records, "other") == "d"
    assert who_gives_way(records, "honest") == "d"
    assert who_gives_way(records, "flood") is None
    assert who_gives_way({"a": "one", "b": "two"}, "three") is None, "all have their share"
    assert largest_share([("a", 3), ("b", 4), ("a", 2)]) == ("a", 5)


def test_a_flood_from_one_prefix_leaves_room_for_others_and_the_other_way_round() -> None:
    records = {f"flood-{number}": "flood" for number in range(64)}
    for number in range(40):
        leaving = who_gives_way(records, f"prefix-{number}")
        assert leaving is not None and records.pop(leaving) == "flood"
        records[f"honest-{number}"] = f"prefix-{number}"
    assert sum(prefix == "flood" for prefix in records.values()) == 24


def test_a_peer_and_a_prefix_ask_so_often_and_others_do_not_notice() -> None:
    limiter = RequestLimiter(RequestRates(per_peer=10, per_prefix=30))
    taken = [limiter.take(Source("one", "p"), 1, 0.0) for _ in range(50)]
    assert 10 <= sum(taken) <= 11 and not taken[-1]
    crowd = [limiter.take(Source(f"peer {number}", "p"), 1, 0.0) for number in range(50)]
    assert 19 <= sum(crowd) <= 21
    assert limiter.take(Source("one", "q"), 1, 0.0) is False and limiter.take(Source("two", "q"), 1, 0.0)
    assert limiter.take(Source("one", "p"), 1, 60.0), "a minute later it may ask again"


@pytest.mark.parametrize(
    ("host", "prefix"),
    [("203.0.113.7", "203.0.113"), ("::ffff:203.0.113.7", "203.0.113"), ("2001:db8:1:2::3", "2001:0db8:0001"),
     ("a.example", "a.example"), ("", "")],
)  # fmt: skip
def test_a_prefix_is_what_one_customer_has(host: str, prefix: str) -> None:
    assert prefix_of(host) == prefix


def test_behind_a_relay_the_relay_counts() -> None:
    assert prefix_of_multiaddr("/ip4/203.0.113.7/tcp/1/p2p/Q/p2p-circuit/p2p/R") == "203.0.113"
    assert prefix_of_multiaddr("/p2p/Q") == ""
