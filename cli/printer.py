"""Generated text on the terminal, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .common import console


@dataclass(slots=True)
class TokenPrinter:
    """A Hugging Face streamer: prints each token when it comes, notes when, and calls `on_token` with their number."""

    tokenizer: Any
    style: str | None = "cyan"
    on_token: Callable[[int], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    _shown: str = ""
    _saw_prompt: bool = False

    def put(self, value: Any) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times_s.append(time.perf_counter())
        self.token_ids += value.reshape(-1).tolist()
        self._show(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))
        if self.on_token is not None:
            self.on_token(len(self.token_ids))

    def _show(self, text: str) -> None:
        if self.style is None or text.endswith("\ufffd"):  # a token may end inside a character
            return
        console.print(text[len(self._shown) :], end="", style=self.style, markup=False, highlight=False, soft_wrap=True)
        self._shown = text

    def end(self) -> None:
        if self.style is not None:
            console.print()

    @property
    def tokens_per_s(self) -> float:
        """Of decoding: the first token, which waits for the prompt, does not count."""
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])
