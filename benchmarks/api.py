"""What does the HTTP API cost, compared with clients that call the swarm themselves?

    python benchmarks/api.py --clients 32 --servers 2 --shape 124M --dtype float32

In turns, on the same servers: direct clients, each in a process of its own, generate at the same time; then as many
chat requests with prompts and answers of the same lengths go to one `swarm api` at the same time, as streams that the
`openai` client reads. The ratio is of tokens per second over all of them; times to the first token are beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from clients import Clients
from common import VOCAB_SIZE, Setting, model_and_servers, new_parser, p50_p95, print_result, rounded, say, setting_of
from openai import AsyncOpenAI
from tasks import Generate, Request
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
MODEL_NAME = "benchmark"


def main() -> None:
    parser = new_parser(__doc__ or "", num_samples=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    with model_and_servers(setting) as (local, directory, servers):
        eos = local.config.eos_token_id
        del local
        save_words(directory)
        with serving(directory, servers.link) as url, Clients(directory, servers.link, arguments.clients) as clients:
            say(f"{arguments.clients} clients and the API are up")
            measure(setting, arguments, clients, url, eos)


def measure(setting: Setting, arguments: argparse.Namespace, clients: Clients, url: str, eos: int) -> None:
    """Run both in turns and print the result."""
    runs: dict[str, list[list[Request]]] = {"direct": [], "api": []}
    for sample in range(setting.num_samples + 1):  # the first one warms up
        found = {
            "direct": run_direct(clients, arguments, sample),
            "api": asyncio.run(run_api(url, arguments, eos, sample)),
        }
        rates = {name: rate_of(requests) for name, requests in found.items()}
        say(f"sample {sample}: direct {rates['direct']:.1f} tokens/s, API {rates['api']:.1f}")
        for name, requests in found.items():
            if sample:
                runs[name].append(requests)
    rates_of = {name: [rate_of(requests) for requests in each] for name, each in runs.items()}
    direct, api = (statistics.median(rates_of[name]) for name in ("direct", "api"))
    requests = {name: [request for each in runs[name] for request in each] for name in runs}
    print_result(
        "api", setting, clients=arguments.clients, prompt_tokens=arguments.prompt_tokens, tokens=arguments.tokens,
        direct_tokens_per_s=rounded(direct), api_tokens_per_s=rounded(api), ratio=rounded(api / direct),
        samples={name: [rounded(rate) for rate in rates] for name, rates in rates_of.items()},
        first_token_s={
            name: p50_p95([request.first_token_s for request in each if not request.error])
            for name, each in requests.items()
        },
        errors=[request.error for each in requests.values() for request in each if request.error],
    )  # fmt: skip


def rate_of(requests: list[Request]) -> float:
    """Tokens per second of all requests together, from the first one's arrival to the last one's end."""
    seconds = max(each.ended_s for each in requests) - min(each.arrived_s for each in requests)
    return sum(each.num_tokens for each in requests) / seconds


def run_direct(clients: Clients, arguments: argparse.Namespace, seed: int) -> list[Request]:
    tasks = [
        Generate(
            prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.tokens, seed=seed * arguments.clients + number
        )
        for number in range(arguments.clients)
    ]
    return [request for requests in clients.run(tasks) for request in requests]


async def run_api(url: str, arguments: argparse.Namespace, eos: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        prompts = [
            " ".join(f"w{draw.randrange(3, VOCAB_SIZE)}" for _ in range(arguments.prompt_tokens))
            for _ in range(arguments.clients)
        ]
        return await asyncio.gather(*(ask(client, prompt, arguments.tokens, eos) for prompt in prompts))


async def ask(client: AsyncOpenAI, prompt: str, num_tokens: int, eos: int) -> Request:
    """One greedy answer of this length, as a stream; what fails is noted in the request."""
    request = Request(time.monotonic())
    try:
        stream = await client.chat.completions.create(
            model=MODEL_NAME, messages=[{"role": "user", "content": prompt}], stream=True, temperature=0,
            max_tokens=num_tokens, logit_bias={str(eos): -100}, stream_options={"include_usage": True},
        )  # fmt: skip
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                request.token_times_s.append(time.monotonic())
            if chunk.usage is not None:
                request.num_tokens = chunk.usage.completion_tokens
    except Exception as exc:  # one request of many: the benchmark counts it and goes on
        request.error = f"{type(exc).__name__}: {exc}"
    request.ended_s = time.monotonic()
    return request


def save_words(directory: str) -> None:
    """Write a tokenizer of as many words as the model has tokens, so that each of them can be read."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


@contextmanager
def serving(directory: str, link: str) -> Iterator[str]:
    """A `swarm api` process on a free port; yields its address."""
    command = [sys.executable, "-m", "swarm.cli.app", "api", directory, "--port", "0", "--name", MODEL_NAME]
    environment = {**os.environ, "SWARM_JOIN": link}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            if len(said) < 3:
                raise RuntimeError("`swarm api` did not start: see what it printed above")
            yield said[2].removesuffix(".")
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
