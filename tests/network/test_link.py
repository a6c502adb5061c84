from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadLink
from swarm.link import JoinLink

PEER = "/ip4/203.0.113.7/tcp/31337/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
LINK = JoinLink((PEER,), "meta-llama/Llama-3.2-1B", 2_000_000_000.0, "home")

multiaddrs = st.from_regex(r"/[A-Za-z0-9/:._-]{1,100}", fullmatch=True)
printable = st.text(min_size=1, max_size=100).filter(str.isprintable)
links = st.builds(
    JoinLink,
    initial_peers=st.lists(multiaddrs, min_size=1, max_size=8).map(tuple),
    model_name=st.none() | printable,
    expires_at_s=st.none() | st.floats(min_value=1.0, max_value=1e11),
    network=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
)


@given(link=links)
def test_link_survives_encoding(link: JoinLink) -> None:
    text = link.encode()
    assert re.fullmatch(r"[A-Za-z0-9_:/.-]+", text)
    assert JoinLink.parse(text, now_s=0.0) == link


@pytest.mark.parametrize("form", ["{}", " {}\n", '"{}"', "'{}'", "`{}`", "<{}>", "\t“{}” "])
def test_link_is_read_as_people_paste_it(form: str) -> None:
    assert JoinLink.parse(form.format(LINK.encode()), now_s=0.0) == LINK


@given(text=st.text(max_size=200) | st.text(max_size=200).map("swarm://v1.".__add__) | st.from_regex(r"swarm://.*"))
def test_garbage_is_a_bad_link(text: str) -> None:
    with pytest.raises(BadLink):
        JoinLink.parse(text)


@given(data=st.data())
def test_truncated_or_mistyped_link_is_noticed(data: st.DataObject) -> None:
    text = LINK.encode()
    cut = data.draw(st.integers(min_value=0, max_value=len(text) - 1))
    with pytest.raises(BadLink):
        JoinLink.parse(text[:cut], now_s=0.0)
    typo = data.draw(st.sampled_from("abcXYZ019_-").filter(lambda letter: letter != text[cut]))
    with contextlib.suppress(BadLink):
        assert JoinLink.parse(text[:cut] + typo + text[cut + 1 :], now_s=0.0) == LINK  # base64's unused last bits


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a join link"),
        ("https://example.org", "is not a join link"),
        (LINK.encode()[:-5], "cut short or mistyped"),
        (LINK.encode() + "x", "cut short or mistyped"),
        ("swarm://v2.abcd", "cut short or mistyped"),
        ("swarm://v3.abcd", "version 3"),
        ("swarm://v1." + "A" * 10_000, "is not a join link"),
    ],
)
def test_bad_link_says_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(BadLink, match=sentence) as caught:
        JoinLink.parse(text)
    assert "\n" not in str(caught.value)


def test_expired_link_is_refused() -> None:
    assert JoinLink.parse(LINK.encode(), now_s=2_000_000_000.0 - 1) == LINK
    with pytest.raises(BadLink, match="expired 2 hours ago"):
        JoinLink.parse(LINK.encode(), now_s=2_000_000_000.0 + 7300)


def test_link_without_peers_cannot_be_made() -> None:
    with pytest.raises(BadLink, match="initial_peers"):
        JoinLink(())
    with pytest.raises(BadLink, match="initial_peers"):
        JoinLink(("127.0.0.1:31337",))
