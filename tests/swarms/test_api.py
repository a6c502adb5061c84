"""The API with the real `openai` client, on the model that ships with Swarm, over real servers."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from swarms_help import held, wait_idle, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.api.app import AppConfig, make_app
from swarm.api.door import DoorConfig, Rates, read_keys
from swarm.api.generation import Engine
from swarm.api.requests import Reader
from swarm.api.service import Service, ServiceConfig
from swarm.api.serving import open_port, serve
from swarm.client import ClientConfig
from swarm.link import JoinLink
from swarm.server import LocalSwarm

PROMPT = "The function returns"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GRACE_S = 120.0
"""How long servers keep what was not closed in order: longer than a test waits."""
KEY = "sk-0123456789abcdef"


class Api(threading.Thread):
    """The API in a thread of this process, on a free port."""

    def __init__(self, engine: Engine, *, template: str | None = TEMPLATE, drain_s: float = 0.0, **config: Any) -> None:
        super().__init__(daemon=True)
        self._loop = asyncio.new_event_loop()
        self._stopping, self._ready = asyncio.Event(), threading.Event()
        self._drain_s, self._sock = drain_s, open_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        limits = {name: config.pop(name) for name in ("max_running", "max_waiting") if name in config}
        app_config = AppConfig(**{"model_name": "embedded", "door": DoorConfig()} | config)
        rates = Rates(app_config.requests_per_min, app_config.tokens_per_min)
        self.service = Service(engine, ServiceConfig(**limits), rates.tokens)
        self._app = make_app(self.service, Reader(engine, template), rates, app_config)
        self.start()
        assert self._ready.wait(30)

    def run(self) -> None:
        serving = serve(
            self._app, self.service, self._sock, self._stopping, self._ready.set, drain_timeout_s=self._drain_s
        )
        self._loop.run_until_complete(serving)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(engine: Engine, **config: Any) -> Iterator[Api]:
    api = Api(engine, **config)
    try:
        yield api
    finally:
        api.stop()
        api.join(30)
        assert not api.is_alive()


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    ranges, settings = [(0, 3), (3, 6)], {"session_grace_s": GRACE_S}
    with LocalSwarm(EMBEDDED_MODEL, ranges, dtype="float32", in_process=True, settings=settings) as local:
        yield local


@pytest.fixture(scope="module")
def engine(swarm: LocalSwarm) -> Iterator[Engine]:
    model = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, join=swarm.link, dtype="float32").eval()
    yield Engine(model, AutoTokenizer.from_pretrained(EMBEDDED_MODEL), 512)
    model.close()


@pytest.fixture(scope="module")
def api(engine: Engine) -> Iterator[Api]:
    with running(engine) as api:
        yield api


@pytest.fixture
def client(api: Api, swarm: LocalSwarm) -> Iterator[OpenAI]:
    """The client; after each test servers hold nothing."""
    with api.client() as client:
        yield client
    wait_idle(swarm)


@pytest.fixture(scope="module")
def local() -> Any:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def locally(local: Any, tokenizer: Any, text: str, num_tokens: int, *, special: bool = True, **kwargs: Any) -> Any:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    with torch.no_grad():
        return local.generate(ids, max_new_tokens=num_tokens, do_sample=False, **kwargs), ids.shape[1]


def complete(client: OpenAI, **kwargs: Any) -> Any:
    return client.completions.create(**{"model": "embedded", "prompt": PROMPT, "temperature": 0} | kwargs)


def chat(client: OpenAI, **kwargs: Any) -> Any:
    return client.chat.completions.create(**{"model": "embedded", "messages": MESSAGES, "temperature": 0} | kwargs)


def refused(call: Any, kind: type[openai.APIStatusError], param: str | None = None) -> openai.APIStatusError:
    with pytest.raises(kind) as error:
        call()
    assert error.value.param == param
    return error.value


def test_a_greedy_completion_is_the_local_one_token_for_token(client, local, tokenizer):
    result, start = locally(local, tokenizer, PROMPT, 40, return_dict_in_generate=True, output_scores=True)
    ids = result.sequences[0, start:].tolist()
    answer = complete(client, max_tokens=40, logprobs=3)
    choice, logprobs = answer.choices[0], answer.choices[0].logprobs
    assert logprobs.tokens == [tokenizer.decode([token_id]) for token_id in ids]
    assert PROMPT + choice.text == tokenizer.decode(result.sequences[0], skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        start, 40, start + 40,
    )  # fmt: skip
    wanted = torch.cat(result.scores).log_softmax(dim=-1)
    ours = torch.tensor(logprobs.token_logprobs)
    assert torch.allclose(ours, wanted[range(40), ids], atol=1e-4)
    assert all(len(top) <= 3 and max(top.values()) == pytest.approx(value) for top, value in zip(
        logprobs.top_logprobs, logprobs.token_logprobs, strict=True
    ))  # fmt: skip
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_a_stream_gives_what_the_whole_answer_holds(client):
    whole = chat(client, max_tokens=30, logprobs=True, top_logprobs=2, stop=["zzz"])
    chunks = list(
        chat(
            client, max_completion_tokens=30, logprobs=True, top_logprobs=2, stop="zzz", stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *parts, last = chunks
    choices = [part.choices[0] for part in parts]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    tokens = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.token for entry in tokens] == [entry.token for entry in whole.choices[0].logprobs.content]
    assert len(tokens) == 30 and len(tokens[0].top_logprobs) == 2
    assert b"".join(bytes(entry.bytes) for entry in tokens).decode() == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices][-2:] == [None, "length"]
    assert last.choices == [] and last.usage == whole.usage


def test_chat_uses_the_template_and_equals_the_local_model(client, local, tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False)
    assert text.startswith("system: Be brief.")
    result, start = locally(local, tokenizer, text, 20, special=False)
    parts = [{"type": "text", "text": part} for part in ("What is", " a list?")]
    for user in (MESSAGES[1], {"role": "user", "content": parts}):
        answer = chat(client, messages=[{"role": "developer", "content": "Be brief."}, user], max_tokens=20)
        assert (
            answer.choices[0].message.content == tokenizer.decode(result[0])[len(tokenizer.decode(result[0, :start])) :]
        )
        assert answer.usage.prompt_tokens == start


def test_stop_strings_end_the_text_wherever_tokens_end(client, tokenizer):
    text = complete(client, max_tokens=40).choices[0].text
    for start in (5, 17, 30):
        stop = text[start : start + 6]
        wanted = text[: text.find(stop)]
        answer = complete(client, max_tokens=40, stop=[stop, "not there"], logprobs=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "stop")
        assert answer.usage.completion_tokens < 40
        assert all(offset < len(wanted) for offset in answer.choices[0].logprobs.text_offset)
        seen = ""
        for chunk in complete(client, max_tokens=40, stop=stop, stream=True):
            seen += chunk.choices[0].text
            assert wanted.startswith(seen)
        assert seen == wanted


def test_the_end_of_a_text_is_a_stop(client, tokenizer):
    end = tokenizer.eos_token_id
    answer = complete(client, max_tokens=20, logit_bias={str(end): 100}, logprobs=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].logprobs.tokens == []


def test_a_seed_gives_the_same_text_alone_and_among_others(client):
    def one(seed: int) -> str:
        return chat(client, max_tokens=12, seed=seed, temperature=1.2, top_p=0.95).choices[0].message.content

    alone = [one(seed) for seed in (1, 2)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, [1, 2] * 4)) == alone * 4
    several = chat(client, max_tokens=12, seed=1, temperature=1.2, top_p=0.95, n=2, stream=True)
    texts = ["", ""]
    for chunk in several:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == alone  # the second choice has the seed after the first one's


def test_several_prompts_of_text_and_of_tokens(client, tokenizer):
    prompts = [PROMPT, "A list is"]
    answer = complete(client, prompt=prompts, max_tokens=5, n=2)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert [choice.text for choice in complete(client, prompt=ids, max_tokens=5).choices] == texts[::2]
    assert complete(client, prompt=ids[0], max_tokens=5).choices[0].text == texts[0]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_echo_gives_log_probabilities_of_the_prompt(client, local, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = local(ids).logits[0].log_softmax(dim=-1)
    answer = complete(client, prompt=ids[0].tolist(), echo=True, logprobs=1, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert torch.allclose(
        torch.tensor(logprobs.token_logprobs[1:]), wanted[range(len(ids[0]) - 1), ids[0, 1:]], atol=1e-4
    )
    more = complete(client, echo=True, logprobs=1, max_tokens=2)
    assert len(more.choices[0].logprobs.tokens) == len(ids[0]) + 2
    assert (
        more.choices[0].text[more.choices[0].logprobs.text_offset[-1] :].endswith(more.choices[0].logprobs.tokens[-1])
    )


def test_penalties_reach_the_model(client):
    plain = complete(client, max_tokens=30).choices[0].text
    assert complete(client, max_tokens=30, frequency_penalty=2, presence_penalty=2).choices[0].text != plain
    banned = complete(client, max_tokens=1, logprobs=0).choices[0].logprobs.tokens[0]
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL).encode(banned, add_special_tokens=False)
    bias = {str(token_id): -100 for token_id in ids}
    assert complete(client, max_tokens=1, logit_bias=bias).choices[0].text != banned


def test_embeddings_are_means_of_the_last_hidden_states(client, local, tokenizer):
    texts = ["A list is", "The function returns nothing"]
    answer = client.embeddings.create(model="embedded", input=texts)
    for text, item in zip(texts, answer.data, strict=True):
        with torch.no_grad():
            states = local.model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        wanted = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        assert torch.allclose(torch.tensor(item.embedding), wanted, atol=1e-5)
    plain = client.embeddings.create(model="embedded", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)
    assert plain.usage.prompt_tokens == len(tokenizer(texts[0])["input_ids"])


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").id == "embedded"
    refused(lambda: client.models.retrieve("other"), openai.NotFoundError, "model")


def test_wrong_requests_say_which_field(client):
    bad = openai.BadRequestError
    refused(lambda: complete(client, model="other"), openai.NotFoundError, "model")
    refused(lambda: complete(client, temperature=3), bad, "temperature")
    refused(lambda: complete(client, max_tokens="3"), bad, "max_tokens")
    refused(lambda: complete(client, n=0), bad, "n")
    refused(lambda: complete(client, suffix="x"), bad, "suffix")
    refused(lambda: complete(client, logit_bias={"x": 1}), bad, "logit_bias")
    refused(lambda: complete(client, prompt=[[1, 10**6]]), bad, "prompt")
    refused(lambda: chat(client, messages=[]), bad, "messages")
    refused(lambda: chat(client, messages=[{"role": "king", "content": "x"}]), bad, "messages.0.role")
    refused(lambda: chat(client, top_logprobs=2), bad, "top_logprobs")
    refused(lambda: chat(client, response_format={"type": "json_object"}), bad, "response_format.type")
    tool = {"type": "function", "function": {"name": "f"}}
    refused(lambda: chat(client, tools=[tool]), bad, "tools")
    error = refused(lambda: complete(client, max_tokens=600), bad, "max_tokens")
    assert error.code == "context_length_exceeded" and error.type == "invalid_request_error"
    assert "512" in error.message


def test_a_model_without_a_template_says_so(engine):
    with running(engine, template=None) as api, api.client() as client:
        assert refused(lambda: chat(client), openai.BadRequestError).code == "no_chat_template"


def test_a_client_that_leaves_frees_its_session(api, client, swarm):
    for number in range(20):  # each at another place of a step
        stream = (complete, chat)[number % 2](client, max_tokens=450, stream=True)
        for _ in range(1 + number % 5):
            next(stream)
        assert all(sessions == 1 for sessions, _ in held(swarm))
        stream.close()
        wait_idle(swarm)  # long before the grace of a broken stream is over
    with ThreadPoolExecutor(1) as pool, api.client() as leaving:
        asked = pool.submit(complete, leaving, max_tokens=450, timeout=0.5)
        wait_until(lambda: held(swarm)[0][0] == 1, "a session is open")
        assert isinstance(asked.exception(), openai.APITimeoutError)
    wait_idle(swarm)
    wait_until(lambda: not api.service._ending, "no thread is left")


def test_a_session_is_cancelled_in_the_middle_of_a_step(engine, swarm):
    model = engine.model
    session = model.inference_session(512)
    ids = torch.randint(3, 4000, (1, 400), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(model.generate, ids, session=session, max_new_tokens=100)
        wait_until(lambda: held(swarm)[0][0] == 1, "a session is open")
        session.cancel()
        assert isinstance(asked.exception(), CancelledError)
    wait_idle(swarm)


def test_stopping_ends_streams_with_an_error_event(engine, swarm):
    with running(engine) as api, api.client() as client:
        stream = complete(client, max_tokens=450, stream=True)
        next(stream)
        api.stop()
        with pytest.raises(openai.APIError) as error:
            list(stream)
        assert error.value.code == "shutting_down"
        api.join(30)
        with pytest.raises(openai.APIConnectionError):
            complete(client)
    wait_idle(swarm)


def test_stopping_lets_answers_finish_and_refuses_new_ones(engine, swarm):
    with running(engine, drain_s=60.0) as api, api.client() as client, api.client() as other:
        stream = complete(client, max_tokens=100, stream=True)
        text = next(stream).choices[0].text
        other.models.list()
        api.stop()
        wait_until(lambda: api.service.draining, "it drains")
        error = refused(lambda: complete(other), openai.InternalServerError)
        assert error.status_code == 503 and int(error.response.headers["retry-after"]) > 0
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert text + "".join(chunk.choices[0].text for chunk in chunks)
    wait_idle(swarm)


def test_keys_rates_and_origins(engine, tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"anna {KEY}\nbert {KEY}2\n")
    door = DoorConfig(keys=read_keys(path), cors_origins=("https://pages.example",))
    with running(engine, door=door, requests_per_min=2) as api, api.client(KEY) as anna, api.client(KEY + "2") as bert:
        with api.client("sk-wrong") as wrong:
            assert refused(lambda: complete(wrong), openai.AuthenticationError).code == "invalid_api_key"
            refused(wrong.models.list, openai.AuthenticationError)
            assert wrong._client.get(f"{api.url}/health").json() == {"status": "ok"}
            assert wrong._client.get(f"{api.url}/metrics").status_code == 401
        for _ in range(2):
            complete(anna, max_tokens=1)
        error = refused(lambda: complete(anna, max_tokens=1), openai.RateLimitError)
        assert 1 <= int(error.response.headers["retry-after"]) <= 30
        complete(bert, max_tokens=1)
        headers = {"Authorization": f"Bearer {KEY}"}
        for origin, status in (("https://pages.example", 200), (api.url, 200), ("https://elsewhere.example", 403)):
            answer = bert._client.get(f"{api.url}/v1/models", headers=headers | {"Origin": origin})
            assert answer.status_code == status
            assert ("access-control-allow-origin" in answer.headers) == (origin == "https://pages.example")
        metrics = bert._client.get(f"{api.url}/metrics", headers=headers).text
        assert 'swarm_api_responses_total{route="/v1/completions",status="429"} 1.0' in metrics
        assert KEY not in metrics


def test_too_many_requests_are_told_to_come_back(engine, swarm):
    with running(engine, max_running=1, max_waiting=0) as api, api.client() as client:
        stream = complete(client, max_tokens=400, stream=True)
        next(stream)
        error = refused(lambda: complete(client), openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "overloaded")
        stream.close()
        wait_until(lambda: not api.service._ending and api.service.turns._num_free == 1, "its turn is over")
        complete(client, max_tokens=1)
    wait_idle(swarm)


def test_a_swarm_without_servers_is_unavailable(swarm, tokenizer):
    nobody = JoinLink.parse(swarm.link).initial_peers[0].rpartition("/")[2]
    config = ClientConfig(
        initial_peers=JoinLink.parse(swarm.link).initial_peers, route_timeout_s=0.2, blocked_servers=(nobody,)
    )
    model = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, client_config=config).eval()
    with running(Engine(model, tokenizer, 512)) as api, api.client() as client:
        for stream in (False, True):
            error = refused(lambda stream=stream: complete(client, stream=stream), openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "no_servers")
    model.close()


def test_bodies_that_are_none_are_refused(api, client):
    http = client._client
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (b"{}", {"Content-Type": "text/plain"}, 400), (b"{", json_type, 400), (b"[]", json_type, 400),
        (b" " * (5 << 20), json_type, 413), (iter([b" " * (1 << 20)] * 5), json_type, 413),
    ):  # fmt: skip
        answer = http.post(f"{api.url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == status and answer.json()["error"]["message"], answer.text
    assert http.get(f"{api.url}/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.get(f"{api.url}/docs").status_code == 404  # its page would load scripts from elsewhere
    described = http.get(f"{api.url}/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]
    assert "text/html" not in json.dumps(described)


def test_the_command_serves_until_sigterm(swarm, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    command = [sys.executable, "-m", "swarm.cli.app", "api", EMBEDDED_MODEL, "--join", swarm.link, "--port", "0"]
    command += ["--name", "embedded", "--chat-template", str(template)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            with OpenAI(base_url=said.split()[2].removesuffix("."), api_key="none", max_retries=0) as client:
                assert chat(client, max_tokens=3).usage.completion_tokens == 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    wait_idle(swarm)
