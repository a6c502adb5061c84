"""A public server dials for strangers what is on the internet, nothing of its own network, whatever that is called."""

from __future__ import annotations

import pytest

from swarm.dialling import MAX_ADDRESSES, MAX_NAMES, Anywhere, OutsideOnly, is_outside, resolve, rule_for

NAMES = {
    "peer.example.org": ["8.8.8.8", "2606:4700::1"],
    "intranet.example.org": ["10.1.2.3"],
    "both.example.org": ["192.168.0.9", "9.9.9.9"],
}


async def resolve_names(host: str) -> list[str]:
    return NAMES.get(host, [])


RULE = OutsideOnly(resolve_names)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1"])
def test_addresses_of_the_internet_are_outside(address):
    assert is_outside(address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1",
     "fd00::1", "::ffff:127.0.0.1", "::ffff:100.64.0.1", "ff02::1", "peer.example.org", ""],
)  # fmt: skip
def test_all_others_are_not_and_names_must_be_resolved_first(address):
    assert not is_outside(address)


@pytest.mark.parametrize(
    ("target", "dialled"),
    [
        ("8.8.8.8:1", ["8.8.8.8:1"]),
        ("[2606:4700::1]:1", ["[2606:4700::1]:1"]),
        ("peer.example.org:1", ["8.8.8.8:1", "[2606:4700::1]:1"]),
        ("both.example.org:1", ["9.9.9.9:1"]),
        ("intranet.example.org:1", []),
        ("nowhere.example.org:1", []),
        ("10.1.2.3:1", []),
        ("[::1]:1", []),
    ],
)
async def test_what_was_resolved_and_checked_is_what_is_dialled(target, dialled):
    assert await RULE.targets([target]) == dialled
    assert await Anywhere().targets([target]) == [target]


@pytest.mark.parametrize(
    ("multiaddr", "dialled"),
    [
        ("/ip4/8.8.8.8/tcp/1/p2p/Qm", ["/ip4/8.8.8.8/tcp/1/p2p/Qm"]),
        ("/dns4/peer.example.org/tcp/1", ["/ip4/8.8.8.8/tcp/1", "/ip6/2606:4700::1/tcp/1"]),
        ("/ip4/8.8.8.8/tcp/1/p2p/Qm/p2p-circuit/p2p/Qn", ["/ip4/8.8.8.8/tcp/1/p2p/Qm/p2p-circuit/p2p/Qn"]),
        ("/ip4/10.1.2.3/tcp/1/p2p/Qm/p2p-circuit/p2p/Qn", []),
        ("/ip4/10.1.2.3/tcp/1", []),
        ("/dns/intranet.example.org/tcp/1", []),
        ("/dnsaddr/peer.example.org/tcp/1", []),  # it may stand for any multiaddr
        ("/ip4/8.8.8.8/tcp/1/ip4/10.1.2.3/tcp/1", []),
        ("/unix/tmp/socket", []),
    ],
)
async def test_libp2p_addresses_are_held_to_the_same_rule(multiaddr, dialled):
    assert await RULE.multiaddrs([multiaddr]) == dialled
    assert await Anywhere().multiaddrs([multiaddr]) == [multiaddr]


async def test_few_names_are_looked_up_for_one_peer_and_few_of_their_addresses_dialled():
    asked: list[str] = []

    async def resolve_to_many(host: str) -> list[str]:
        asked.append(host)
        return [f"8.8.8.{number}" for number in range(100)]

    targets = [f"{number}.example.org:{port}" for number in range(8) for port in (1, 2)]
    assert len(await OutsideOnly(resolve_to_many).targets(targets)) == 2 * MAX_NAMES * MAX_ADDRESSES
    assert len(asked) == MAX_NAMES


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001"])
async def test_the_system_resolves_what_only_looks_like_a_name(host):
    assert not any(map(is_outside, await resolve(host)))
    assert await OutsideOnly().targets([f"{host}:1"]) == []


@pytest.mark.parametrize(
    ("own", "rule"),
    [
        (["/ip4/8.8.8.8/tcp/1/p2p/Qm", "/ip4/10.0.0.1/tcp/1"], OutsideOnly),
        (["/dns/peer.example.org/tcp/1"], OutsideOnly),
        (["/dns/nowhere.example.org/tcp/1"], OutsideOnly),
        (["/dns/intranet.example.org/tcp/1"], Anywhere),
        (["/ip4/10.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1"], Anywhere),
        ([], Anywhere),
    ],
)
async def test_a_server_that_is_visible_on_the_internet_is_bound_by_it(own, rule):
    assert type(await rule_for(own, resolve_names)) is rule
