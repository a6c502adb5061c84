"""What does a session cost a server in memory? Cache as the server reports it, and its resident memory.

    python benchmarks/kv_memory.py --shape 124M --servers 1

The reference is what the tokens themselves take: keys and values of every block, in the servers' dtype. Each row opens
sessions, fills them, looks, and closes them: longer sessions, more sessions, a session that was declared much longer
than it is, and sessions that begin with the same tokens, which need to be stored once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import model_and_servers, new_parser, print_result, rounded, say, setting_of
from transformers import LlamaConfig
from watch import Watch

from swarm import AutoDistributedModelForCausalLM
from swarm.codec import torch_dtype

CLOSING_TIMEOUT_S = 30.0
WARM_UP_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Some sessions that are open at the same time."""

    question: str
    number: int
    tokens: int
    """In each of them."""
    declared: int
    """How long each of them was said to become."""
    common: int = 0
    """Tokens at the beginning that are the same in all."""

    @property
    def num_tokens(self) -> int:
        return self.number * self.tokens

    @property
    def num_distinct_tokens(self) -> int:
        """Tokens that have to be stored if what is common is stored once."""
        return self.num_tokens - (self.number - 1) * self.common


def plan(max_tokens: int, max_sessions: int) -> Iterator[Sessions]:
    """The rows of the result."""
    for tokens in _doubling(128, max_tokens):
        yield Sessions(question="length", number=1, tokens=tokens, declared=tokens)
    for number in _doubling(1, max_sessions):
        yield Sessions(question="number", number=number, tokens=256, declared=256)
    yield Sessions(question="declared", number=4, tokens=128, declared=max_tokens)
    yield Sessions(question="common prefix", number=max_sessions, tokens=544, declared=544, common=512)


def main() -> None:
    parser = new_parser(__doc__ or "", num_servers=1)
    parser.add_argument("--max-tokens", type=int, default=2048, help="the longest session")
    parser.add_argument("--max-sessions", type=int, default=16)
    arguments = parser.parse_args()
    setting = setting_of(arguments)
    with model_and_servers(setting) as (local, directory, servers), Watch(directory, servers) as watch:
        bytes_per_token = _bytes_per_token(local.config, setting.dtype)
        del local
        model = AutoDistributedModelForCausalLM.from_pretrained(directory, join=servers.link)
        with contextlib.closing(model):
            start_bytes = sum(watch.rss_bytes())
            _measure(model, watch, Sessions(question="", number=1, tokens=WARM_UP_TOKENS, declared=WARM_UP_TOKENS), 1)
            idle_bytes = sum(watch.rss_bytes())
            rows = []
            for sessions in plan(arguments.max_tokens, arguments.max_sessions):
                rows.append(_measure(model, watch, sessions, bytes_per_token))
                say(str(rows[-1]))
            left = watch.wait_empty(CLOSING_TIMEOUT_S)
            end_bytes = sum(watch.rss_bytes())
    print_result(
        "kv_memory",
        setting,
        bytes_per_token=bytes_per_token,
        rss_mib={"at start": start_bytes >> 20, "warm, idle": idle_bytes >> 20, "at the end": end_bytes >> 20},
        sessions_left=sum(load.num_sessions for load in left),
        cache_left_bytes=sum(load.cache_used_bytes for load in left),
        rows=rows,
    )


def _measure(model: Any, watch: Watch, sessions: Sessions, bytes_per_token: int) -> dict[str, Any]:
    """Open and fill the sessions, and look at the servers before and meanwhile."""
    watch.wait_empty(CLOSING_TIMEOUT_S)
    rss_bytes = sum(watch.rss_bytes())
    hidden_size = model.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    prefix_BLD = torch.randn(1, sessions.common, hidden_size, generator=draw).to(model.dtype)
    with contextlib.ExitStack() as opened:
        for _ in range(sessions.number):
            session = opened.enter_context(model.inference_session(max_length=sessions.declared, batch_size=1))
            own_BLD = torch.randn(1, sessions.tokens - sessions.common, hidden_size, generator=draw).to(model.dtype)
            session.step(torch.cat([prefix_BLD, own_BLD], dim=1), num_outputs=0)
        used_bytes = sum(load.cache_used_bytes for load in watch.loads())
        grown_bytes = sum(watch.rss_bytes()) - rss_bytes
    needed_bytes = sessions.num_distinct_tokens * bytes_per_token
    own_bytes = sessions.number * (sessions.tokens - sessions.common) * bytes_per_token
    copies = (used_bytes - own_bytes) / (sessions.common * bytes_per_token) if sessions.common else None
    return asdict(sessions) | {
        "needed_mib": rounded(needed_bytes / 2**20),
        "used_mib": rounded(used_bytes / 2**20),
        "used_ratio": rounded(used_bytes / needed_bytes),
        "prefix_stored_times": rounded(copies),
        "rss_grown_mib": rounded(grown_bytes / 2**20),
    }


def _bytes_per_token(config: LlamaConfig, dtype: str) -> int:
    """Keys and values of one token in all blocks."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * torch_dtype(dtype).itemsize


def _doubling(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


if __name__ == "__main__":
    main()
