"""Text to token ids through tokenizer.json.

A text is cut where special tokens begin, and the ids of each segment are cached: a system prompt that many share is tokenised once.
Cutting there changes nothing, since a tokenizer itself splits at special tokens before it does anything else. A segment keeps the
special token it begins with, so that rules for the very start of a text (a prefix space) apply as they do in the whole.
"""

from __future__ import annotations

import itertools
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from runtime.text.chat import read_json, special_tokens
from runtime.text.detokenize import Detokenizer, detokenizer_factory
from workers.errors import CheckpointError

_CACHE_BYTES = 64 << 20
_PROBE = "a"


class Tokenizer:
    """Safe to use from several threads; encoding releases the interpreter lock."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_token_id: int | None = None, cache_bytes: int = _CACHE_BYTES) -> None:
        """`bos_token_id`: put before a plain text where tokenizer.json itself puts nothing there.

        DeepSeek's files are like that: the token is asked for in tokenizer_config.json alone.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._cuts, self._pattern = _special_tokens_to_cut_at(backend)
        self._added = _probe_added_ids(backend)
        if bos_token_id is not None and self._added is not None and not self._added[0]:
            self._added = ([bos_token_id], self._added[1])
        self._segments = _SegmentCache(cache_bytes)
        self._make_detokenizer = detokenizer_factory(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """None without a tokenizer.json. CheckpointError when it cannot be read."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        bos = special_tokens(config).get("bos_token")
        return cls(backend, backend.token_to_id(bos) if bos is not None and config.get("add_bos_token") is True else None)

    def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Ids of `text`, typecode "I". Special tokens written in the text are recognised.

        `add_special_tokens`: also those that the model expects around a plain text. A chat template writes its own.
        """
        if self._added is None and add_special_tokens:
            return array("I", self._backend.encode_batch_fast([text], add_special_tokens=True)[0].ids)
        ids = array("I", self._added[0] if self._added and add_special_tokens else ())
        for segment_ids in self._encode_segments(self._segments_of(text)):
            ids.extend(segment_ids)
        if self._added and add_special_tokens:
            ids.extend(self._added[1])
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole output, without special tokens. Ids that the vocabulary lacks give no text."""
        detokenizer = self.new_detokenizer()
        return detokenizer.feed(token_ids) + detokenizer.finish()

    def new_detokenizer(self) -> Detokenizer:
        return self._make_detokenizer()

    def _segments_of(self, text: str) -> list[str]:
        if not self._cuts:
            return [text]
        starts = [match.start() for match in self._pattern.finditer(text) if match.group() in self._cuts]
        bounds = [0, *starts, len(text)]
        return [text[start:end] for start, end in itertools.pairwise(bounds) if end > start]

    def _encode_segments(self, segments: list[str]) -> list[array[int]]:
        cached = {segment: self._segments.get(segment) for segment in segments}
        found = {segment: ids for segment, ids in cached.items() if ids is not None}
        missing = [segment for segment in cached if segment not in found]
        # encode_batch_fast, also for one: unlike encode it lets other threads run.
        for segment, encoding in zip(missing, self._backend.encode_batch_fast(missing, add_special_tokens=False), strict=True):
            found[segment] = array("I", encoding.ids)
            self._segments.put(segment, found[segment])
        return [found[segment] for segment in segments]


class _SegmentCache:
    """Least recently used segments go first once their texts and ids pass `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, segment: str) -> array[int] | None:
        with self._lock:
            ids = self._ids.get(segment)
            if ids is not None:
                self._ids.move_to_end(segment)
            return ids

    def put(self, segment: str, ids: array[int]) -> None:
        size = _size_bytes(segment, ids)
        if size > self._max_bytes:
            return
        with self._lock:
            if segment in self._ids:
                return
            self._ids[segment] = ids
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _size_bytes(*self._ids.popitem(last=False))


def _size_bytes(segment: str, ids: array[int]) -> int:
    return 4 * len(segment) + ids.itemsize * len(ids)


def _special_tokens_to_cut_at(backend: tokenizers.Tokenizer) -> tuple[frozenset[str], re.Pattern[str]]:
    """The tokens before which a text may be cut, and a pattern that matches added tokens as the tokenizer does, leftmost and longest.

    Tokens that take neighbouring spaces are no cuts. They are matched all the same: one may cover what looks like a cut.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    cuts = frozenset(token.content for token in added if token.special and not (token.lstrip or token.rstrip))
    if any(token.single_word for token in added):
        cuts = frozenset()  # whether such a token matches depends on its neighbours
    return cuts, re.compile(_any_of({token.content for token in added}))


def _any_of(strings: set[str]) -> str:
    """A pattern that matches the longest of `strings`. Common beginnings are written once: a plain alternation of the thousand tokens of
    some vocabularies would try each of them at every "<" of a text, and nothing else runs meanwhile."""
    by_first: dict[str, set[str]] = {}
    for string in strings - {""}:
        by_first.setdefault(string[0], set()).add(string[1:])
    branches = [re.escape(first) + _any_of(rests) for first, rests in sorted(by_first.items())]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in strings else ''}"


def _probe_added_ids(backend: tokenizers.Tokenizer) -> tuple[Sequence[int], Sequence[int]] | None:
    """What the post-processor puts around a text; None when it does something else."""
    bare = backend.encode(_PROBE, add_special_tokens=False).ids
    full = backend.encode(_PROBE, add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return None
