"""From tokens to text as it comes: whole characters only, and nothing that belongs to a stop string."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no character, or not yet."""
MAX_UNFINISHED = 3
"""A character of four bytes has at most so many of these before it is whole: one a byte in some tokenizers."""
NUM_CONTEXT_TOKENS = 8
"""Of the prompt, decoded along: some tokenizers drop the space before what they decode first."""


class TextDecoder:
    """Decodes tokens one after another.

    Args:
        decode: token ids to text, special tokens left out.
        prompt_ids: what the tokens follow.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        """Tokens since the last but one place where a character ended."""
        self._read = len(self._window)
        """How many of them have been decoded whole."""
        self._num_done = len(decode(self._window))
        """Characters of their text that were given out."""

    def add(self, token_id: int) -> str:
        """Take a token; return the characters that are whole now."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_unfinished = min(MAX_UNFINISHED, len(text) - len(text.rstrip(REPLACEMENT)))
        end = max(self._num_done, len(text) - num_unfinished)
        new = text[self._num_done : end]
        self._num_done = end
        if not num_unfinished and new:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._num_done = len(self._decode(self._window))
        return new


class StopFinder:
    """Holds back what may become a stop string; what comes before one goes out, it and what follows does not."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Take text; return what can be given out."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            out, self._held = self._held[: min(places)], ""
            return out
        size = max((self._overlap(stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
        return out

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held begin the stop string."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    """What characters of byte-level tokens stand for: those that can be seen for themselves, others for the rest."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


def bytes_of(token: str, *, is_byte_level: bool) -> bytes | None:
    """The bytes that a token of the vocabulary stands for by its spelling; None: it does not say.

    Args:
        is_byte_level: whether each character of a token stands for a byte.
    """
    if found := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(found[1], 16)])
    if is_byte_level and all(char in BYTE_OF for char in token):
        return bytes(BYTE_OF[char] for char in token)
    return None
