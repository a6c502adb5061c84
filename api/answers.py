"""What is sent back: whole answers and chunks of streams, in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .choosing import Chosen
from .generation import Engine, Piece, Token


@dataclass(slots=True)
class Choice:
    """What has come of one choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.num_tokens = piece.num_tokens
        self.finish_reason = piece.finish_reason

    def put_behind(self, text: str, tokens: Sequence[Token]) -> None:
        """Let the choice begin with its prompt."""
        self.tokens = [*tokens, *(replace(token, start=token.start + len(text)) for token in self.tokens)]
        self.text = text + self.text


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


class Shape(Protocol):
    """How the answers of one route look."""

    def first(self, number: int) -> dict[str, Any] | None:
        """The chunk before all others of a choice; None: there is none."""
        ...

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """A piece of a choice as a chunk of the stream; None: nothing to tell."""
        ...

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """The chunk after all choices, with what the request has used."""
        ...

    def whole(self, choices: Sequence[Choice], used: dict[str, int]) -> dict[str, Any]:
        """All of it at once."""
        ...


class _Shape:
    """What both have in common.

    Args:
        model: as clients name it.
        engine: knows what tokens read.
        include_usage: whether a stream ends with a chunk of usage; all others then say that they have none.
    """

    prefix = ""
    objects = ("", "")
    """Of a whole answer, and of a chunk."""

    def __init__(self, model: str, engine: Engine, *, include_usage: bool, logprobs: bool) -> None:
        self._engine = engine
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.objects[1], "choices": choices}
        return chunk | {"usage": used} if self._include_usage else chunk

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        return self._chunk([], used)

    def whole(self, choices: Sequence[Choice], used: dict[str, int]) -> dict[str, Any]:
        listed = [self._choice(number, choice) for number, choice in enumerate(choices)]
        return {**self._head, "object": self.objects[0], "choices": listed, "usage": used}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError


class CompletionShape(_Shape):
    """Of /v1/completions."""

    prefix = "cmpl"
    objects = ("text_completion", "text_completion")

    def first(self, number: int) -> dict[str, Any] | None:
        return None

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return None
        return self._chunk([self._part(number, piece.text, piece.tokens, piece.finish_reason)])

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        return self._part(number, choice.text, choice.tokens, choice.finish_reason)

    def _part(self, number: int, text: str, tokens: Iterable[Token], reason: str | None) -> dict[str, Any]:
        logprobs = self._of(list(tokens)) if self._logprobs else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        text = self._engine.token_text
        return {
            "tokens": [text(token.chosen.token_id) for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [
                {text(token_id): logprob for token_id, logprob in token.chosen.top} if token.chosen.top else None
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }


class ChatShape(_Shape):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    objects = ("chat.completion", "chat.completion.chunk")

    def first(self, number: int) -> dict[str, Any] | None:
        return self._chunk([self._part(number, {"role": "assistant", "content": ""}, (), None)])

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return None
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk([self._part(number, delta, piece.tokens, piece.finish_reason)])

    def _part(self, number: int, delta: dict[str, Any], tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": self._of(tokens), "finish_reason": reason}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": number,
            "message": message,
            "logprobs": self._of(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(token.chosen) for token in tokens], "refusal": None}

    def _entry(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._one(token_id, logprob) for token_id, logprob in chosen.top]
        return self._one(chosen.token_id, chosen.logprob) | {"top_logprobs": top}

    def _one(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._engine.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._engine.token_bytes(token_id)),
        }
