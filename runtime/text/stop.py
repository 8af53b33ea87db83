"""Stop strings: found across the boundaries of tokens and events, cut from the text, and located in the output's tokens."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.text.detokenize import Detokenizer


class Found(NamedTuple):
    match: str
    start: int  # characters of the output before the match


class StopFinder:
    """Finds the stop string that ends first in a text that arrives in pieces; of two that end together, the longer.

    That choice does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""
        self._num_passed = 0
        self._longest_prefix = max(map(len, stop)) - 1 if stop else 0

    def feed(self, piece: str) -> tuple[str, Found | None]:
        """The text that is certainly not part of a stop string, and the match if there is one."""
        text = self._held + piece
        end, match = len(text) + 1, ""
        for stop in self._stop:
            at = text.find(stop)
            if at >= 0 and at + len(stop) < end:
                end, match = at + len(stop), stop
        if match:
            start = end - len(match)
            self._held = ""
            return text[:start], Found(match, self._num_passed + start)
        num_sure = len(text) - self._num_undecided(text)
        self._held = text[num_sure:]
        self._num_passed += num_sure
        return text[:num_sure], None

    def finish(self) -> str:
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class OutputPiece(NamedTuple):
    text: str
    match: str = ""  # the stop string that ended the output
    num_tokens: int = 0  # with a match: the output tokens up to and including the one that completed it


class OutputText:
    """The text of one output: detokenised, with stop strings looked for."""

    def __init__(self, make_detokenizer: Callable[[], Detokenizer], stop: Sequence[str], known_token_ids: Sequence[int] = ()) -> None:
        """`known_token_ids`: output whose text was shown before, when a request is resumed."""
        self._make_detokenizer = make_detokenizer
        self._detokenizer = make_detokenizer()
        self._finder = StopFinder(stop) if stop else None
        self._token_ids: list[int] = []  # kept for locating a match only
        if known_token_ids:
            self.feed(known_token_ids)

    def feed(self, token_ids: Sequence[int]) -> OutputPiece:
        text = self._detokenizer.feed(token_ids)
        if self._finder is None:
            return OutputPiece(text)
        self._token_ids.extend(token_ids)
        return self._search(self._finder, text)

    def finish(self) -> OutputPiece:
        """The text held back, which may still complete a stop string."""
        text = self._detokenizer.finish()
        if self._finder is None:
            return OutputPiece(text)
        piece = self._search(self._finder, text)
        return piece if piece.match else OutputPiece(piece.text + self._finder.finish())

    def _search(self, finder: StopFinder, text: str) -> OutputPiece:
        sure, found = finder.feed(text)
        if found is None:
            return OutputPiece(sure)
        return OutputPiece(sure, found.match, self._num_tokens_until(found))

    def _num_tokens_until(self, found: Found) -> int:
        """The fewest leading tokens whose text contains the match: independent of how the tokens were grouped on their way here."""
        total = len(self._token_ids)

        def contains(num_tokens: int) -> bool:
            detokenizer = self._make_detokenizer()
            text = detokenizer.feed(self._token_ids[:num_tokens]) + detokenizer.finish()
            return text.startswith(found.match, found.start)

        back = 1  # the match ends in the newest tokens, so search backwards in growing steps
        while back < total and contains(total - back):
            back *= 2
        return bisect.bisect_left(range(total), True, lo=max(0, total - back), key=contains)
