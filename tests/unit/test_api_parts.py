"""The parts of the API that need no model: text, choosing, keys, rates, turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
import torch
from starlette.datastructures import Headers
from transformers import AutoTokenizer

from swarm import EMBEDDED_MODEL
from swarm.api.choosing import Chooser, Sampling
from swarm.api.door import Keys, Rates, read_keys
from swarm.api.errors import ApiError, translated
from swarm.api.service import Turns
from swarm.api.text import StopFinder, TextDecoder
from swarm.errors import BadRequest, CacheFull, NoRoute, PeerBug, PromptTooLong, TooManyRequests

# V vocabulary


def decoder(prompt: str) -> tuple[TextDecoder, object]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    return TextDecoder(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), tokenizer(prompt)["input_ids"]), (
        tokenizer
    )


@pytest.mark.parametrize("text", [" naïve café, 日本語 and 🦊🏳️‍🌈", "ÄÖÜ" * 5, " plain\n  words"])
def test_text_comes_in_whole_characters_and_is_what_all_tokens_together_read(text):
    stream, tokenizer = decoder("The word é")
    pieces = [stream.add(token_id) for token_id in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_never_given_out():
    stream, tokenizer = decoder("a")
    ids = tokenizer("🦊")["input_ids"]
    assert len(ids) > 2  # the model has no token for it
    assert "".join(map(stream.add, ids[:-1])) in ("", " ")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_nothing_of_a_stop_string_is_given_out(size):
    text = "ab abab END abc"
    for stops, wanted in [
        (["END"], "ab abab "), (["abc"], "ab abab END "), (["bab "], "ab a"), (["D a", "ND"], "ab abab E"),
        (["nothing"], text), ([], text), (["c"], text[:-1]),
    ]:  # fmt: skip
        finder = StopFinder(stops)
        out = ""
        for start in range(0, len(text), size):
            out += finder.add(text[start : start + size])
            assert wanted.startswith(out)
            if finder.found:
                break
        assert out + finder.finish() == wanted
        assert finder.found == (wanted != text)


def choose(sampling: Sampling, logits_V: list[float], times: int = 1) -> list[int]:
    chooser = Chooser(sampling)
    scores = torch.tensor([logits_V])
    return [int(chooser(torch.zeros(1, 1, dtype=torch.int64), scores).argmax()) for _ in range(times)]


def test_penalties_and_biases_change_what_is_likeliest():
    logits = [1.0, 2.0, 3.0]
    assert choose(Sampling(temperature=0), logits, 2) == [2, 2]
    assert choose(Sampling(temperature=0, frequency_penalty=0.4), logits, 5) == [2, 2, 2, 1, 2]
    assert choose(Sampling(temperature=0, presence_penalty=1.5), logits, 3) == [2, 1, 2]
    assert choose(Sampling(temperature=0, logit_bias={0: 2.5, 2: -1.0}), logits) == [0]


def test_top_p_and_top_k_leave_only_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(choose(Sampling(top_p=0.6, seed=0), logits, 200)) == {0, 1}
    assert set(choose(Sampling(top_k=3, seed=0), logits, 400)) == {0, 1, 2}
    assert set(choose(Sampling(top_k=3, top_p=0.5, seed=0), logits, 50)) == {0}
    shares = Counter(choose(Sampling(seed=0), logits, 4000))
    assert abs(shares[0] / 4000 - 0.5) < 0.05 and abs(shares[3] / 4000 - 0.05) < 0.02
    cold = Counter(choose(Sampling(seed=0, temperature=0.25), logits, 1000))
    assert cold[0] > 800


def test_a_seed_says_all_tokens():
    logits = [0.0] * 50
    assert choose(Sampling(seed=5), logits, 20) == choose(Sampling(seed=5), logits, 20)
    assert choose(Sampling(seed=5), logits, 20) != choose(Sampling(seed=6), logits, 20)
    assert choose(Sampling(), logits, 20) != choose(Sampling(), logits, 20)


def test_log_probabilities_are_the_models_whatever_is_chosen():
    logits_V = torch.tensor([[1.0, 2.0, 3.0]])
    chooser = Chooser(Sampling(temperature=0, logit_bias={0: 100}, num_top_logprobs=2))
    chooser(torch.zeros(1, 1), logits_V)
    wanted = logits_V[0].log_softmax(dim=-1)
    assert chooser.chosen.token_id == 0 and chooser.chosen.logprob == pytest.approx(float(wanted[0]))
    assert [token_id for token_id, _ in chooser.chosen.top] == [2, 1]


def test_a_key_file_gives_keys_and_its_errors_tell_none(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# ours\nanna sk-0123456789abcdef\n\nsk-ffffffffffffffff\n")
    keys = Keys(read_keys(path))
    assert keys.caller(Headers({"authorization": "Bearer sk-0123456789abcdef"}), "") == "anna"
    assert keys.caller(Headers({"authorization": "bearer  sk-ffffffffffffffff"}), "") == "line 4"
    for given in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer sk-0123456789abcdeF"}):
        with pytest.raises(ApiError) as error:
            keys.caller(Headers(given), "")
        assert error.value.status == 401
    assert "0123456789" not in repr(read_keys(path))
    for text in ("short", "anna sk-0123456789abcdef more", "a sk-0123456789abcdef\na sk-ffffffffffffffff", "#\n"):
        path.write_text(text)
        with pytest.raises(BadRequest) as refused:
            read_keys(path)
        assert "0123456789" not in str(refused.value)
    with pytest.raises(BadRequest):
        read_keys(tmp_path / "none")


def test_rates_count_requests_and_tokens_of_each_caller():
    now = [0.0]
    rates = Rates(requests_per_min=2, tokens_per_min=100, clock=lambda: now[0])
    rates.request("anna")
    rates.request("anna")
    with pytest.raises(ApiError) as error:
        rates.request("anna")
    assert error.value.status == 429 and error.value.headers["Retry-After"] == "30"
    rates.request("bert")
    now[0] = 30.0
    rates.request("anna")
    rates.tokens("bert", 150)
    with pytest.raises(ApiError) as error:
        rates.request("bert")
    assert "tokens" in str(error.value) and error.value.retry_after_s == pytest.approx(30)
    now[0] = 61.0
    rates.request("bert")


async def test_callers_take_turns_however_many_requests_one_has():
    turns, order = Turns(1, 10), []
    release = asyncio.Event()

    async def work(caller: str) -> None:
        async with turns.turn(caller):
            await release.wait()
            order.append(caller)

    tasks = []
    for caller in "aaaabb":
        tasks.append(asyncio.create_task(work(caller)))
        await asyncio.sleep(0)
    assert turns.num_waiting == 5
    turns.check_room(5)
    with pytest.raises(ApiError):
        turns.check_room(6)
    tasks[1].cancel()  # it waits no more, and takes nobody's turn
    await asyncio.gather(tasks[1], return_exceptions=True)
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert "".join(order) == "aabab"
    async with turns.turn("c"):  # the slot is free again
        pass


def test_errors_have_the_status_that_clients_expect():
    wanted = {
        PromptTooLong("p"): (400, "context_length_exceeded"), BadRequest("b"): (400, None),
        NoRoute("n"): (503, "no_servers"), CacheFull("c"): (503, "cache_full"),
        TooManyRequests("t", 7): (429, "swarm_busy"), PeerBug("x"): (500, "swarm_error"),
    }  # fmt: skip
    for error, (status, code) in wanted.items():
        found = translated(error)
        assert found is not None and (found.status, found.code) == (status, code)
        assert ("Retry-After" in found.headers) == (status in (429, 503))
    assert translated(RuntimeError("secret")) is None
