from __future__ import annotations

import random

import pytest

from runtime.text.detokenize import detokenizer_factory
from runtime.text.stop import Found, OutputText, StopFinder
from tests.runtime.frontdoor.model_folder import train_tokenizer


def naive(text: str, stop: list[str]) -> tuple[str, str]:
    """(text before the match, match): the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        for word in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(word):
                return text[: end - len(word)], word
    return text, ""


def test_equals_a_naive_search_however_the_text_is_cut() -> None:
    draw = random.Random(9)
    for _ in range(3000):
        stop = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3))]
        text = "".join(draw.choices("abc", k=draw.randrange(30)))
        finder, shown, match, rest = StopFinder(stop), "", "", text
        while rest and not match:
            count = draw.randint(1, 6)
            piece, found = finder.feed(rest[:count])
            rest = rest[count:]
            shown += piece
            match = found.match if found else ""
            assert found is None or found.start == len(shown)
        assert (shown if match else shown + finder.finish(), match) == naive(text, stop)


def test_holds_back_no_more_than_could_begin_a_stop_string() -> None:
    finder = StopFinder(["</tool>", "<<"])
    assert finder.feed("a < b") == ("a < b", None)
    assert finder.feed("x</to") == ("x", None)
    assert finder.feed("y") == ("</toy", None)
    assert finder.feed("<") == ("", None)
    assert finder.feed("<") == ("", Found("<<", 11))


@pytest.mark.parametrize("stop", ["jumps", "x 😀", "over the", "\n"])
def test_the_token_count_does_not_depend_on_how_tokens_were_grouped(stop: str) -> None:
    tokenizer = train_tokenizer()
    new_detokenizer = detokenizer_factory(tokenizer)
    ids = tokenizer.encode("the quick fox 😀 jumps over the\nlazy dog", add_special_tokens=False).ids
    wanted = next(count for count in range(len(ids) + 1) if stop in tokenizer.decode(ids[:count]))
    draw = random.Random(2)
    for _ in range(50):
        text, rest, shown = OutputText(new_detokenizer, [stop]), ids, ""
        while True:
            count = draw.randint(1, 12)
            piece = text.feed(rest[:count])
            rest = rest[count:]
            shown += piece.text
            if piece.match:
                break
        assert (piece.match, piece.num_tokens) == (stop, wanted)
        assert shown + stop == tokenizer.decode(ids)[: len(shown + stop)]


def test_a_match_may_appear_only_at_the_end() -> None:
    tokenizer = train_tokenizer()
    ids = tokenizer.encode("dog😀", add_special_tokens=False).ids[:-1]  # the last character stays incomplete
    text = OutputText(detokenizer_factory(tokenizer), ["g\ufffd"])
    shown = text.feed(ids).text
    piece = text.finish()
    assert (shown + piece.text, piece.match) == ("do", "g\ufffd")


def test_known_tokens_of_a_resumed_output_are_counted_and_not_shown_again() -> None:
    tokenizer = train_tokenizer()
    ids = tokenizer.encode("the fox 😀 jumps", add_special_tokens=False).ids
    text = OutputText(detokenizer_factory(tokenizer), ["jumps"], ids[:2])
    piece = text.feed(ids[2:])
    assert (piece.match, piece.num_tokens) == ("jumps", len(ids))
    assert tokenizer.decode(ids[:2]) + piece.text == "the fox 😀 "
