"""One choice of an answer: a session of its own, and a call of the library's `generate` in a thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .choosing import Chooser, Chosen, Sampling, described
from .text import StopFinder, TextDecoder, bytes_of

# B batch, L prompt, V vocabulary, D hidden

FinishReason = Literal["stop", "length"]

MAX_ECHO_TOKENS = 2048
"""Of a prompt whose log probabilities are wanted: there are logits over the whole vocabulary for each token."""


class Cancelled(Exception):
    """A generation was ended before its end."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer with its log probabilities."""

    chosen: Chosen
    start: int
    """Where in the answer's text it begins."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a choice has given since the last piece."""

    text: str
    num_tokens: int
    """Tokens generated so far."""
    tokens: tuple[Token, ...] = ()
    """Those that belong to the text, where log probabilities are wanted."""
    finish_reason: FinishReason | None = None
    """Why nothing follows; None: more follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one choice is to be."""

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str] = ()


@dataclass(slots=True)
class Engine:
    """A model with its tokenizer, for use from many threads at once.

    Args:
        model: a distributed language model of Hugging Face's class, in eval mode.
        tokenizer: it is never changed: encoding and decoding are given one each.
    """

    model: Any
    tokenizer: Any
    max_length: int
    """Tokens of a prompt and its answer together."""
    _encoding: threading.Lock = field(default_factory=threading.Lock)
    _decoder: Any = None
    _is_byte_level: bool = False
    """Whether the characters of a token each stand for a byte."""
    _config: Any = None

    def __post_init__(self) -> None:
        self._decoder = copy.deepcopy(self.tokenizer)  # who encodes sets options that no other thread may be using
        backend = getattr(self._decoder, "backend_tokenizer", None)
        self._is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
        self._config = copy.deepcopy(self.model.generation_config)
        self._config.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None,
            max_length=None, max_new_tokens=None, return_dict_in_generate=False,
        )  # fmt: skip
        if self._config.pad_token_id is None:  # one sequence is never padded, but the library would warn each time
            self._config.pad_token_id = next(iter(self.eos_ids), 0)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, with or without the special tokens that the tokenizer puts around it."""
        with self._encoding:
            ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._decoder.decode(ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of what a token stands for, which may be a part of a character."""
        found = bytes_of(str(self._decoder.convert_ids_to_tokens(token_id)), is_byte_level=self._is_byte_level)
        return self.token_text(token_id).encode() if found is None else found

    def token_text(self, token_id: int) -> str:
        """What a token alone reads."""
        text: str = self._decoder.decode([token_id])
        return text

    @torch.no_grad()
    def echo(self, ids: Sequence[int], num_top_logprobs: int | None) -> tuple[str, list[Token]]:
        """The text of a prompt and, where log probabilities are wanted, its tokens; the first has none."""
        if num_top_logprobs is None:
            return self.decode(list(ids)), []
        logits_LV = self.model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        decoder, text, tokens = TextDecoder(self.decode, ()), "", []
        for place, token_id in enumerate(ids):
            chosen = Chosen(token_id, None)
            if place:
                chosen = described(token_id, logits_LV[place - 1].float().log_softmax(dim=-1), num_top_logprobs)
            tokens.append(Token(chosen, len(text)))
            text += decoder.add(token_id)
        return text, tokens

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> list[float]:
        """The mean of the last hidden states over all tokens, after the final norm, scaled to length 1; [D]."""
        states_LD = self.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].float()
        vector: list[float] = torch.nn.functional.normalize(states_LD.mean(dim=0), dim=0).tolist()
        return vector

    def generation(self, order: Order) -> Generation:
        return Generation(self, self._config, order)


class Generation:
    """One choice under way. `run` blocks in a thread of its own; `cancel` may be called from any."""

    def __init__(self, engine: Engine, config: Any, order: Order) -> None:
        self._engine = engine
        self._config = config
        self._order = order
        self._lock = threading.Lock()
        self._session: Any = None
        self._cancelled = False

    def run(self, emit: Callable[[Piece], None]) -> None:
        """Generate to the end.

        Args:
            emit: told each piece, the last one with a finish reason.
        Raises: SwarmError; Cancelled: it was, or its model was closed.
        """
        order, engine = self._order, self._engine
        session = engine.model.inference_session(len(order.prompt_ids) + order.max_tokens)
        try:
            with self._lock:
                self._session = session
                if self._cancelled:
                    raise Cancelled
            chooser = Chooser(order.sampling)
            watcher = _Watcher(engine, order, chooser, emit)
            config = copy.deepcopy(self._config)
            config.max_new_tokens = order.max_tokens
            prompt_ids = torch.tensor([list(order.prompt_ids)])
            engine.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                session=session,
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([watcher]),
            )
        except CancelledError:
            raise Cancelled from None
        finally:
            session.close()

    def cancel(self) -> None:
        """Let `run` end now, in the middle of a step; servers free the cache."""
        with self._lock:
            self._cancelled = True
            if self._session is not None:
                self._session.cancel()


class _Watcher(StoppingCriteria):
    """Sees every token when it is there, makes text of it, and says when to stop."""

    def __init__(self, engine: Engine, order: Order, chooser: Chooser, emit: Callable[[Piece], None]) -> None:
        self._order = order
        self._chooser = chooser
        self._emit = emit
        self._eos_ids = engine.eos_ids
        self._decoder = TextDecoder(engine.decode, order.prompt_ids)
        self._finder = StopFinder(order.stops)
        self._num_tokens = 0
        self._num_decoded, self._num_given = 0, 0
        """Characters that were decoded, and those of them that were given out."""
        self._held: list[Token] = []
        self._wants_tokens = order.sampling.num_top_logprobs is not None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take the last token of input_ids [1, T]. Returns: whether the sequence ends, [1]."""
        done = self._take(int(input_ids[0, -1]))
        return torch.tensor([done], device=input_ids.device)

    def _take(self, token_id: int) -> bool:
        self._num_tokens += 1
        if token_id in self._eos_ids:
            return self._finish("stop")
        if self._wants_tokens:
            self._held.append(Token(self._chooser.chosen, self._num_decoded))
        text = self._decoder.add(token_id)
        self._num_decoded += len(text)
        out = self._finder.add(text)
        self._num_given += len(out)
        if self._finder.found:
            return self._finish("stop", out)
        if self._num_tokens == self._order.max_tokens:
            return self._finish("length", out)
        # Where nothing can be shown yet, it is said all the same that there is a token: the caller counts them.
        tokens = [token for token in self._held if token.start < self._num_given]
        self._held = self._held[len(tokens) :]
        self._emit(Piece(out, self._num_tokens, tuple(tokens)))
        return False

    def _finish(self, reason: FinishReason, out: str = "") -> bool:
        rest = self._finder.finish()
        self._num_given += len(rest)
        tokens = [token for token in self._held if not self._finder.found or token.start < self._num_given]
        self._emit(Piece(out + rest, self._num_tokens, tuple(tokens), reason))
        return True
