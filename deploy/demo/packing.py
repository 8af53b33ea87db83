"""Token streams: documents packed into sequences for training, and fixed windows of the held-out text.

Shape suffixes: B sequences, L tokens of a sequence, N tokens of a stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.demo.corpus import Corpus, Document

_BATCH = 512  # documents handed to the tokenizer at once

Tokens = NDArray[np.int64]


class EncodedCorpus(NamedTuple):
    files: list[Tokens]
    topics: list[Tokens]
    snippets: list[Tokens]
    chats: list[Tokens]
    held_out: list[Tokens]


def encode_corpus(tokenizer: Tokenizer, corpus: Corpus) -> EncodedCorpus:
    def encode(documents: tuple[Document, ...]) -> list[Tokens]:
        encoded: list[Tokens] = []
        for start in range(0, len(documents), _BATCH):
            texts = [document.text for document in documents[start : start + _BATCH]]
            batch = tokenizer.encode_batch(texts, add_special_tokens=False)
            encoded.extend(np.asarray(encoding.ids, dtype=np.int64) for encoding in batch)
        return encoded

    return EncodedCorpus(*(encode(getattr(corpus, field)) for field in EncodedCorpus._fields))


def count_tokens(documents: list[Tokens]) -> int:
    return sum(len(document) for document in documents)


class PackedStream:
    """An endless stream of sequences. An epoch is every file and topic once, with a fresh draw of snippets and chats among them.

    A sequence that would begin inside a short document begins at that document's start instead. So many sequences begin with <|bos|>,
    as every request does, and the end of the document before is not lost: it was in the sequence before.
    """

    def __init__(self, corpus: EncodedCorpus, chat_share: float, snippet_share: float, seed: int) -> None:
        """The shares are of an epoch's tokens; a pool that is too small for its share is used whole."""
        self._corpus = corpus
        self._rng = np.random.default_rng(seed)
        num_text_tokens = count_tokens(corpus.files) + count_tokens(corpus.topics)
        num_all_tokens = num_text_tokens / (1 - chat_share - snippet_share)
        self._num_chat_tokens = int(num_all_tokens * chat_share)
        self._num_snippet_tokens = int(num_all_tokens * snippet_share)
        self.num_epochs = 0
        self._start_epoch()
        self.epoch_tokens = len(self._stream_N)

    def take(self, num_sequences: int, length: int) -> Tokens:
        """The next [B, L] tokens. Raises ValueError when an epoch is shorter than one sequence."""
        if length > self.epoch_tokens:
            raise ValueError(f"sequences of {length} tokens asked of a corpus of {self.epoch_tokens}")
        return np.stack([self._next_sequence(length) for _ in range(num_sequences)])

    def _next_sequence(self, length: int) -> Tokens:
        document = int(np.searchsorted(self._starts, self._cursor, side="right")) - 1
        start, end = int(self._starts[document]), int(self._starts[document + 1])
        if end - start <= length // 2:
            self._cursor = start
        if self._cursor + length > len(self._stream_N):
            self._start_epoch()
            return self._next_sequence(length)
        sequence_L = self._stream_N[self._cursor : self._cursor + length]
        self._cursor += length
        if self._cursor >= len(self._stream_N):
            self._start_epoch()
        return sequence_L

    def _start_epoch(self) -> None:
        documents = [
            *self._corpus.files,
            *self._corpus.topics,
            *self._draw(self._corpus.chats, self._num_chat_tokens),
            *self._draw(self._corpus.snippets, self._num_snippet_tokens),
        ]
        ordered = [documents[index] for index in self._rng.permutation(len(documents))]
        self._stream_N = np.concatenate(ordered)
        self._starts = np.concatenate([[0], np.cumsum([len(document) for document in ordered])])
        # A different phase each epoch: otherwise long files would be cut at nearly the same places every time.
        self._cursor = int(self._rng.integers(0, min(1024, len(self._stream_N) // 8) + 1))
        self.num_epochs += 1

    def _draw(self, pool: list[Tokens], num_tokens: int) -> list[Tokens]:
        drawn: list[Tokens] = []
        taken = 0
        for index in self._rng.permutation(len(pool)):
            if taken >= num_tokens:
                break
            drawn.append(pool[index])
            taken += len(pool[index])
        return drawn


def windows(documents: list[Tokens], length: int, max_windows: int | None = None) -> Tokens:
    """The documents end to end, cut into [B, L] without overlap; the incomplete last window is dropped.

    Raises ValueError when there is not enough text for one window.
    """
    stream_N = np.concatenate(documents)
    num_windows = len(stream_N) // length
    if num_windows == 0:
        raise ValueError(f"{len(stream_N)} held-out tokens do not fill a window of {length}")
    windows_BL = stream_N[: num_windows * length].reshape(num_windows, length)
    return windows_BL[:max_windows]
