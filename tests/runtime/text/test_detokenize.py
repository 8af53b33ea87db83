from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime.text.detokenize import ByteFallbackDetokenizer, ByteLevelDetokenizer, Detokenizer, SlidingDetokenizer, detokenizer_factory
from tests.runtime.frontdoor.model_folder import train_tokenizer


def byte_level() -> Tokenizer:
    """With added tokens inside and outside the byte alphabet."""
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([AddedToken("plain é added", special=False), AddedToken("Ġodd", special=False)])
    tokenizer.add_special_tokens([AddedToken("<|late|>", special=True)])
    return tokenizer


def byte_fallback(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """A vocabulary like Llama 2's: pieces with U+2581 for spaces, and a token per byte."""
    words = ["▁", "a", "b", "▁a", "▁hello", "llo", "é", "▁▁", "😀", "<0xZZ>"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = byte_fallback(decoders.Metaspace())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], type]] = {
    "byte_level": (byte_level, ByteLevelDetokenizer),
    "byte_fallback": (byte_fallback, ByteFallbackDetokenizer),
    "byte_fallback without strip": (
        lambda: byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        ByteFallbackDetokenizer,
    ),
    "metaspace": (metaspace, SlidingDetokenizer),
    "byte_fallback in another order": (
        lambda: byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])),
        SlidingDetokenizer,
    ),
}


def in_pieces(detokenizer: Detokenizer, ids: list[int], draw: random.Random) -> list[str]:
    pieces = []
    while ids:
        count = draw.randint(1, 5)
        pieces.append(detokenizer.feed(ids[:count]))
        ids = ids[count:]
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_random_ids_equal_decoding_the_whole(kind: str) -> None:
    make, wanted = KINDS[kind]
    tokenizer = make()
    new_detokenizer = detokenizer_factory(tokenizer)
    assert isinstance(new_detokenizer(), wanted)
    draw = random.Random(5)
    vocabulary = list(range(tokenizer.get_vocab_size() + 3))  # a model's may be larger than its tokenizer's
    few = draw.sample(vocabulary, 12)
    for _ in range(1500):
        ids = draw.choices(draw.choice([vocabulary, few]), k=draw.randrange(50))
        assert "".join(in_pieces(new_detokenizer(), ids, draw)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback in another order"])
def test_valid_text_never_shows_a_broken_character(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    new_detokenizer = detokenizer_factory(tokenizer)
    draw = random.Random(6)
    alphabet = "ab é漢😀👍🏽 a"
    for _ in range(300):
        text = "a" + "".join(draw.choices(alphabet, k=20)) + "a"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = in_pieces(new_detokenizer(), ids, draw)
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_a_character_is_held_until_its_last_byte_and_no_longer() -> None:
    tokenizer = byte_level()
    detokenizer = detokenizer_factory(tokenizer)()
    ids = tokenizer.encode("😀!", add_special_tokens=False).ids
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["", "", "", "😀", "!"]
    assert detokenizer.finish() == ""


def test_special_tokens_give_no_text() -> None:
    detokenizer = detokenizer_factory(byte_level())()
    assert detokenizer.feed([0, 1, 2, 3]) + detokenizer.finish() == ""
