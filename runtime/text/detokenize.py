"""Token ids to text, a few at a time, so that the pieces put together equal decoding the whole output at once.

The decoder named in tokenizer.json decides how:
- byte level (Llama 3, Qwen, DeepSeek): a token is bytes, and the output is their UTF-8. A character cut between tokens is held back.
- byte fallback (Llama 2, Mistral): a token is text, or one byte of a character that the vocabulary lacks. A run of byte tokens is one
  string if all of it is valid UTF-8 and replacement characters otherwise, so a run is held back until it ends.
- any other: the last tokens are decoded again with each new one. Holds back a text that ends in a replacement character, and runs of
  byte tokens where the decoder has byte fallback in another place than usual.

Special tokens give no text.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 64  # a sliding window longer than this is cut even where it ends in a replacement character


class Detokenizer(Protocol):
    """The text of one output. Not for use from several threads."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete, in whole characters. Ids that the vocabulary lacks give no text."""
        ...

    def finish(self) -> str:
        """What was held back. Nothing may be fed afterwards."""
        ...


class ByteLevelDetokenizer:
    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        table = self._token_bytes
        try:
            data = b"".join([table[token_id] for token_id in token_ids])
        except IndexError:
            data = b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class ByteFallbackDetokenizer:
    def __init__(self, pieces: Sequence[str | int], strip: str, num_strip: int) -> None:
        """`pieces`: per id its text, or its byte. Up to `num_strip` characters `strip` are taken off the front of the output."""
        self._pieces = pieces
        self._strip = strip
        self._num_strip = num_strip
        self._run = bytearray()

    def feed(self, token_ids: Sequence[int]) -> str:
        out = []
        for token_id in token_ids:
            piece = self._pieces[token_id] if token_id < len(self._pieces) else ""
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece:
                if self._run:
                    out.append(self._end_run())
                out.append(piece)
        return self._stripped("".join(out))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if not text.startswith(self._strip):
                self._num_strip = 0
                break
            self._num_strip -= 1
            text = text[1:]
        return text


class SlidingDetokenizer:
    """For decoders without a table: the text of a token is what it adds to the text of those just before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], with_text: frozenset[int], byte_tokens: frozenset[int]) -> None:
        """`with_text`: ids that name a token with text. `byte_tokens`: those of them that stand for a byte; a run of these is decoded as
        one, so nothing of it is known before it ends."""
        self._decode = decode
        self._with_text = with_text
        self._byte_tokens = byte_tokens
        self._window: list[int] = []  # tokens shown so far that the next ones may depend on, then those not shown
        self._num_shown = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_id for token_id in token_ids if token_id in self._with_text)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if not self._window or (self._window[-1] in self._byte_tokens and not final):
            return ""
        shown = self._decode(self._window[: self._num_shown])
        text = self._decode(self._window)
        num_new = len(self._window) - self._num_shown
        if text.endswith(REPLACEMENT) and not final and num_new < _WINDOW_TOKENS:
            return ""
        if len(text) <= len(shown) and not final:
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(shown) :]


def detokenizer_factory(backend: tokenizers.Tokenizer) -> Callable[[], Detokenizer]:
    """Reads the decoder and the vocabulary once; each call of the result makes the detokenizer of one output."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = list(_flattened(decoder))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return partial(ByteLevelDetokenizer, _byte_level_table(backend))
    fallback = _byte_fallback(backend, steps)
    if fallback is not None:
        return fallback
    pieces = _byte_fallback_table(backend, [])
    with_text = frozenset(token_id for token_id, piece in enumerate(pieces) if piece != "")
    byte_tokens = frozenset(token_id for token_id in with_text if "ByteFallback" in kinds and isinstance(pieces[token_id], int))
    return partial(SlidingDetokenizer, partial(_decode, backend), with_text, byte_tokens)


def _decode(backend: tokenizers.Tokenizer, token_ids: Sequence[int]) -> str:
    """Some of the library's decoders panic when there is nothing to decode."""
    return str(backend.decode(list(token_ids), skip_special_tokens=True)) if token_ids else ""


def _byte_fallback(backend: tokenizers.Tokenizer, steps: Sequence[dict[str, Any]]) -> Callable[[], Detokenizer] | None:
    """None unless the decoder is: replace strings, then byte fallback, fuse, and perhaps strip the front."""
    replace = list(itertools.takewhile(lambda step: step["type"] == "Replace", steps))
    rest = [step["type"] for step in steps[len(replace) :]]
    if rest not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    if any("String" not in step["pattern"] for step in replace):
        return None
    strip, num_strip = "", 0
    if rest[-1] == "Strip":
        if steps[-1]["stop"]:
            return None  # what is stripped from the back is known only at the end
        strip, num_strip = steps[-1]["content"], steps[-1]["start"]
    table = _byte_fallback_table(backend, [(step["pattern"]["String"], step["content"]) for step in replace])
    return partial(ByteFallbackDetokenizer, table, strip, num_strip)


def _flattened(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _flattened(inner)
    elif decoder:
        yield decoder


def _shown_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    """The token string per id; empty for special tokens and for ids that name none."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    for token_id, added in backend.get_added_tokens_decoder().items():
        tokens[token_id] = "" if added.special else added.content
    return tokens


def _byte_level_table(backend: tokenizers.Tokenizer) -> list[bytes]:
    alphabet = _byte_alphabet()
    table = []
    for token in _shown_tokens(backend):
        try:
            table.append(bytes([alphabet[character] for character in token]))
        except KeyError:  # an added token that is not written in the byte alphabet stands for itself
            table.append(token.encode())
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters: printable Latin-1 as itself, the others from U+0100 on in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _byte_fallback_table(backend: tokenizers.Tokenizer, replacements: Sequence[tuple[str, str]]) -> list[str | int]:
    table: list[str | int] = []
    for token in _shown_tokens(backend):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                table.append(int(token[3:5], 16))
                continue
            except ValueError:
                pass
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        table.append(token)
    return table
