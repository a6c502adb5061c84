"""Sessions: continued, rolled back, fed in pieces; equal to the whole model on the same tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from swarms_help import held, wait_idle, wait_until
from tiny import HIDDEN, random_ids

from swarm.errors import BadRequest, PromptTooLong


def generate(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return model.generate(*args, **{"max_new_tokens": 6, "do_sample": False} | kwargs)


def hidden(batch_size: int, length: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def through_local(pair: Any, x_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The blocks of the whole model, without embeddings and final norm."""
    last: list[torch.Tensor] = []
    hook = pair.local.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        pair.local.model(inputs_embeds=x_BLD, use_cache=False, **kwargs)
    hook.remove()
    return last[0]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the largest error is within the tolerance, relative to the largest value where that is above 1."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(1))


def test_several_calls_of_generate_continue_one_session(llama):
    first, second, third = random_ids(1, 7), random_ids(1, 4, seed=2), random_ids(1, 1, seed=3)
    text = torch.zeros(1, 0, dtype=torch.int64)
    with llama.remote.inference_session(max_length=64):
        for new in (first, second, third):
            wanted = generate(llama.local, torch.cat([text, new], dim=1))
            ours = generate(llama.remote, new)
            assert torch.equal(ours, wanted[:, text.shape[1] :])
            text = wanted


def test_generate_goes_on_without_new_tokens(llama):
    ids = random_ids(1, 7)
    with llama.remote.inference_session(max_length=64):
        start = generate(llama.remote, ids, max_new_tokens=5)
        rest = generate(llama.remote, max_new_tokens=5)
    assert torch.equal(torch.cat([start, rest], dim=1), generate(llama.local, ids, max_new_tokens=10))


def test_a_session_is_continued_by_name_from_outside_its_with_block(llama):
    ids = random_ids(2, 7)
    session = llama.remote.inference_session(max_length=64)
    start = generate(llama.remote, ids, session=session)
    ended = generate(llama.remote, ids[:, :3], session=session)
    session.close()
    wanted = generate(llama.local, torch.cat([start, ids[:, :3]], dim=1))
    assert torch.equal(torch.cat([start, ended], dim=1), wanted)


def test_a_padded_batch_is_continued(llama):
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    ids[0, :3], mask[0, :3] = 0, 0
    more = random_ids(2, 3, seed=2)
    with llama.remote.inference_session(max_length=64):
        start = generate(llama.remote, ids, attention_mask=mask)
        ours = generate(llama.remote, more, attention_mask=torch.ones_like(more))
    whole = torch.cat([start, more], dim=1)
    whole_mask = torch.cat([mask, torch.ones(2, whole.shape[1] - 6, dtype=torch.int64)], dim=1)
    wanted = generate(llama.local, whole, attention_mask=whole_mask)
    assert torch.equal(torch.cat([start, ours], dim=1), wanted)


def test_beam_search_can_be_followed_by_more(llama):
    ids, more = random_ids(1, 7), random_ids(1, 3, seed=2)
    with llama.remote.inference_session(max_length=64):
        start = generate(llama.remote, ids, num_beams=4)
        ours = generate(llama.remote, more)
    wanted = generate(llama.local, torch.cat([start, more], dim=1))
    assert torch.equal(start, generate(llama.local, ids, num_beams=4))
    assert torch.equal(torch.cat([start, ours], dim=1), wanted)


def test_rolling_back_and_going_on_differently(llama):
    ids, other = random_ids(1, 7), random_ids(1, 2, seed=5)
    with llama.remote.inference_session(max_length=64) as session:
        start = generate(llama.remote, ids)
        session.position = 9
        kept = start[:, :10]
        ours = generate(llama.remote, other)
        assert torch.equal(session.output_ids[:, :10], kept)
        assert torch.equal(session.output_ids, generate(llama.local, torch.cat([kept, other], dim=1)))
        assert torch.equal(ours, session.output_ids[:, 10:])


def test_the_same_tokens_come_again_after_rolling_back_to_the_prompt(llama):
    ids = random_ids(1, 7)
    with llama.remote.inference_session(max_length=64) as session:
        first = generate(llama.remote, ids)[:, 7:]
        session.position = 6
        assert torch.equal(generate(llama.remote), first)
        session.position = 0
        assert torch.equal(generate(llama.remote, ids)[:, 7:], first)


def test_steps_in_pieces_equal_the_whole(llama):
    x_BLD = hidden(2, 20)
    whole = through_local(llama, x_BLD)
    with llama.remote.inference_session(max_length=20) as session:
        at, pieces = 0, []
        for length in (1, 6, 1, 1, 8, 3):
            pieces.append(session.step(x_BLD[:, at : at + length]))
            at += length
            assert session.position == at
    assert close(torch.cat(pieces, dim=1), whole)


def test_multi_token_steps_after_rolling_back(llama):
    x_BLD, other = hidden(1, 12), hidden(1, 5, seed=2)
    with llama.remote.inference_session(max_length=32) as session:
        session.step(x_BLD)
        for position in (12, 7, 3, 0):
            session.position = min(position, session.position)
            ours = session.step(other)
            assert close(ours, through_local(llama, torch.cat([x_BLD[:, :position], other], dim=1))[:, position:])
            session.position = position


def test_a_step_leaves_its_input_alone(llama):
    x_BLD, other = hidden(1, 8), hidden(1, 4, seed=2)
    kept = x_BLD.clone()
    with llama.remote.inference_session(max_length=32) as session:
        session.step(x_BLD)
        session.position = 2
        session.step(other)
    assert torch.equal(x_BLD, kept)


def test_only_the_wanted_outputs_come_back(llama):
    x_BLD = hidden(2, 9)
    with llama.remote.inference_session(max_length=20) as session:
        assert close(session.step(x_BLD[:, :7], num_outputs=2), through_local(llama, x_BLD)[:, 5:7])
        assert session.step(x_BLD[:, 7:8], num_outputs=0).shape == (2, 0, HIDDEN)
        assert close(session.step(x_BLD[:, 8:]), through_local(llama, x_BLD)[:, 8:])


def test_a_prefill_longer_than_one_step_allows_is_cut(llama):
    x_BLD = hidden(2, 700)  # 1400 tokens; a server takes 512 at once
    with llama.remote.inference_session(max_length=700) as session:
        ours = session.step(x_BLD)
    assert close(ours, through_local(llama, x_BLD), 1e-4)


def test_steps_with_padding(llama):
    x_BLD, mask = hidden(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = through_local(llama, x_BLD, attention_mask=mask, position_ids=ids)
    with llama.remote.inference_session(max_length=20) as session:
        first = session.step(x_BLD[:, :6], attention_mask=mask[:, :6], position_ids=ids[:, :6])
        rest = session.step(x_BLD[:, 6:], position_ids=ids[:, 6:])
    assert close(torch.cat([first, rest], dim=1)[mask.bool()], whole[mask.bool()])


def test_steps_that_reorder_sequences(llama):
    x_BLD, more = hidden(3, 5), hidden(3, 2, seed=2)
    with llama.remote.inference_session(max_length=20) as session:
        session.step(x_BLD)
        ours = session.step(more, beam_idx=[2, 2, 0])
    assert close(ours, through_local(llama, torch.cat([x_BLD[[2, 2, 0]], more], dim=1))[:, 5:])


def test_more_than_max_length_is_refused_and_the_session_survives(llama):
    x_BLD = hidden(1, 9)
    with llama.remote.inference_session(max_length=8) as session:
        session.step(x_BLD[:, :5])
        with pytest.raises(PromptTooLong, match="opened for 8 tokens and holds 5; 4 more do not fit"):
            session.step(x_BLD[:, 5:])
        assert close(session.step(x_BLD[:, 5:8]), through_local(llama, x_BLD[:, :8])[:, 5:])


def test_a_session_longer_than_servers_allow_is_refused_at_once(llama):
    with (
        pytest.raises(PromptTooLong, match="10000 tokens was asked for, the servers of this model allow 8192"),
        llama.remote.inference_session(max_length=10_000) as session,
    ):
        session.step(hidden(1, 2))


@pytest.mark.parametrize(
    "step, sentence",
    [
        ((torch.zeros(1, 2, HIDDEN + 1), {}), f"shape .batch, length, {HIDDEN}"),
        ((torch.zeros(2, HIDDEN), {}), "shape .batch, length"),
        ((torch.zeros(1, 2, HIDDEN, dtype=torch.int64), {}), "in floating point"),
        ((torch.zeros(1, 0, HIDDEN), {}), "at least one"),
        ((torch.zeros(2, 1, HIDDEN), {}), "holds 1 sequences, the step has 2"),
        ((torch.zeros(1, 2, HIDDEN), {"attention_mask": torch.ones(1, 5, dtype=torch.int64)}), "attention_mask"),
        ((torch.zeros(1, 2, HIDDEN), {"attention_mask": torch.full((1, 2), 3)}), "attention_mask"),
        ((torch.zeros(1, 2, HIDDEN), {"position_ids": torch.zeros(3, 2, dtype=torch.int64)}), "position_ids"),
        ((torch.zeros(1, 2, HIDDEN), {"position_ids": torch.full((1, 2), -1)}), "position_ids"),
        ((torch.zeros(1, 2, HIDDEN), {"beam_idx": [1]}), "beam_idx"),
        ((torch.zeros(1, 2, HIDDEN), {"beam_idx": [0, 0]}), "beam_idx"),
        ((torch.zeros(1, 2, HIDDEN), {"num_outputs": 3}), "cannot return 3"),
        ((torch.zeros(1, 2, HIDDEN), {"num_outputs": -1}), "cannot return -1"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_the_session_survives(llama, step, sentence):
    x_BLD = hidden(1, 6)
    with llama.remote.inference_session(max_length=16) as session:
        session.step(x_BLD[:, :3])
        with pytest.raises(BadRequest, match=sentence):
            session.step(step[0], **step[1])
        assert session.position == 3
        assert close(session.step(x_BLD[:, 3:]), through_local(llama, x_BLD)[:, 3:])


def test_positions_ahead_of_the_session_are_refused(llama):
    with llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
        for position in (4, -1):
            with pytest.raises(BadRequest, match=r"0\.\.3"):
                session.position = position


def test_a_session_fed_by_hand_is_not_continued_by_generate(llama):
    with llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
        with pytest.raises(BadRequest, match="not fed with token ids"):
            generate(llama.remote, random_ids(1, 3))


def test_a_closed_session_says_so(llama):
    with llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
    session.close()
    with pytest.raises(BadRequest, match="closed: open a new one"):
        session.step(hidden(1, 3))


def test_an_error_inside_the_with_block_frees_the_servers(llama):
    with pytest.raises(KeyError), llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
        assert all(num_sessions == 1 for num_sessions, _ in held(llama.swarm))
        raise KeyError
    wait_idle(llama.swarm)


def test_servers_hold_a_session_and_its_cache_only_while_it_is_open(llama):
    stats = [server.running.sessions for server in llama.swarm.servers]
    with llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
        assert all(each.statistics().num_sessions == 1 and each.statistics().cache_used_bytes for each in stats)
    wait_idle(llama.swarm)


def test_a_cache_that_is_dropped_frees_the_servers(llama):
    with torch.no_grad():
        output = llama.remote(random_ids(1, 4), use_cache=True)
        assert all(server.running.sessions.statistics().num_sessions for server in llama.swarm.servers)
        del output
    wait_idle(llama.swarm)


def test_a_client_that_leaves_without_closing_frees_the_servers(llama, swarms):
    client = swarms.join(llama.swarm, llama.path)
    session = client.inference_session(max_length=16)  # held by a name: a session that is dropped closes itself
    session.step(hidden(1, 3))
    assert all(num_sessions == 1 for num_sessions, _ in held(llama.swarm))
    client.close()
    wait_idle(llama.swarm)


def test_many_sessions_leave_no_task_behind(llama):
    loops = [server._loop for server in llama.swarm.servers] + [llama.remote._swarm.connection.loop._loop]

    def count() -> int:
        return sum(len(asyncio.all_tasks(loop)) for loop in loops)

    with llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
    wait_idle(llama.swarm)
    before = count()
    for _ in range(8):
        with llama.remote.inference_session(max_length=16) as session:
            session.step(hidden(1, 3))
    with pytest.raises(KeyError), llama.remote.inference_session(max_length=16) as session:
        session.step(hidden(1, 3))
        raise KeyError
    wait_until(lambda: count() <= before + 2, "the tasks of closed sessions end")


class Interrupted(Exception):
    pass


class InterruptingStreamer:
    """Stands for Ctrl-C: raises after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted

    def end(self) -> None:
        pass


def test_an_interrupted_generation_leaves_the_session_as_it_was(llama):
    ids, more = random_ids(1, 6), random_ids(1, 3, seed=5)
    wanted_first = llama.local.generate(ids, max_new_tokens=4, do_sample=False)
    wanted = llama.local.generate(torch.cat([wanted_first, more], dim=1), max_new_tokens=5, do_sample=False)
    with llama.remote.inference_session(max_length=64) as session:
        for start in (ids, None):
            with pytest.raises(Interrupted):
                llama.remote.generate(start, max_new_tokens=9, do_sample=False, streamer=InterruptingStreamer(3))
            if start is not None:
                assert session.position == 0 and session.output_ids is None
                llama.remote.generate(ids, max_new_tokens=4, do_sample=False)
        llama.remote.generate(more, max_new_tokens=5, do_sample=False)
        assert torch.equal(session.output_ids, wanted)


def test_beams_in_a_session_are_followed_by_the_sequences_they_returned(llama):
    ids = random_ids(1, 6)
    with llama.remote.inference_session(max_length=64) as session:
        llama.remote.generate(ids, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False)
        returned = session.output_ids
        rest = llama.remote.generate(max_new_tokens=4, do_sample=False)
    wanted = llama.local.generate(returned, attention_mask=torch.ones_like(returned), max_new_tokens=4, do_sample=False)
    assert torch.equal(rest, wanted[:, returned.shape[1] :])


def test_padding_of_a_session_is_remembered_when_later_calls_name_no_mask(llama):
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    whole = llama.local.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    with llama.remote.inference_session(max_length=64):
        first = llama.remote.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        rest = llama.remote.generate(max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat([first, rest], dim=1), whole)


def test_a_cache_implementation_for_local_caches_is_no_obstacle(llama):
    ids = random_ids(1, 6)
    ours = llama.remote.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(ours, llama.local.generate(ids, max_new_tokens=4, do_sample=False))


def test_two_threads_cannot_feed_one_session(llama):
    with llama.remote.inference_session(max_length=64) as session:
        x_BLD = torch.randn(1, 2, llama.remote.config.hidden_size)
        session.step(x_BLD)
        session._stepping.acquire()
        with pytest.raises(BadRequest, match="one session per thread"):
            session.step(x_BLD)
        session._stepping.release()
        assert session.position == 2


def test_a_closed_model_says_so_and_its_sessions_close_quietly(llama, swarms):
    model = swarms.join(llama.swarm, llama.path)
    session = model.inference_session(max_length=16)
    session.step(torch.randn(1, 2, model.config.hidden_size))
    model.close()
    session.close()
    with pytest.raises(BadRequest, match="was closed"):
        model.generate(random_ids(1, 4), max_new_tokens=2)
