from __future__ import annotations

import asyncio
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from protos import inference_pb2 as pb
from runtime.frontdoor.validate import Validator
from runtime.text.model_card import ModelCard, ServedModel
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.model_folder import train_tokenizer, write_model
from workers.errors import CheckpointError


def byte_level() -> Backend:
    """With added tokens of every kind: special ones that eat spaces, a normal one that covers a special one."""
    backend = train_tokenizer()
    backend.add_special_tokens([AddedToken("<|left|>", lstrip=True), AddedToken("<|right|>", rstrip=True), AddedToken("x<|im_start|>y")])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("norm", normalized=True)])
    return backend


def first_only() -> Backend:
    """A prefix space for the start of the text only, like newer SentencePiece conversions."""
    backend = train_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.model = models.BPE(
        vocab={"<s>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7, "<unk>": 8},
        merges=[("▁", "a")],
        unk_token="<unk>",
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


def prepending() -> Backend:
    backend = first_only()
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


@pytest.mark.parametrize("make", [byte_level, first_only, prepending])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_cutting_at_special_tokens_changes_nothing(make: object, add_special_tokens: bool) -> None:
    backend = make()  # type: ignore[operator]
    tokenizer = Tokenizer(make(), cache_bytes=5000)  # type: ignore[operator]
    parts = [
        "<s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|left|>",
        "<|right|>",
        "x<|im_start|>y",
        "<tool>",
        "norm",
        " ",
        "  ",
        "a",
        "b a",
        "the dog",
        "\n",
        "😀",
        "<|im",
        "x",
    ]
    draw = random.Random(4)
    for _ in range(1500):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        wanted = backend.encode(text, add_special_tokens=add_special_tokens).ids
        assert list(tokenizer.encode(text, add_special_tokens=add_special_tokens)) == wanted


def test_a_known_system_prompt_is_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spy:
        def __init__(self, backend: Backend) -> None:
            self._backend = backend
            self.seen: list[str] = []

        def encode_batch_fast(self, texts: list[str], **options: object) -> object:
            self.seen.extend(texts)
            return self._backend.encode_batch_fast(texts, **options)

    tokenizer = Tokenizer(train_tokenizer())
    spy = Spy(tokenizer._backend)
    monkeypatch.setattr(tokenizer, "_backend", spy)
    system = "<|im_start|>system\n" + "be brief and kind. " * 100 + "<|im_end|>"
    for question in ("one", "two", "three"):
        tokenizer.encode(f"<s>{system}<|im_start|>user\n{question}", add_special_tokens=False)
    assert spy.seen.count(system.removesuffix("<|im_end|>")) == 1
    assert [text for text in spy.seen if "user" in text] == [f"<|im_start|>user\n{question}" for question in ("one", "two", "three")]


def test_the_segment_cache_is_bounded() -> None:
    tokenizer = Tokenizer(train_tokenizer(), cache_bytes=2000)
    for number in range(200):
        tokenizer.encode(f"number {number} of many", add_special_tokens=False)
    cache = tokenizer._segments
    assert 0 < cache._num_bytes <= 2000
    assert cache._num_bytes == sum(4 * len(text) + 4 * len(ids) for text, ids in cache._ids.items())


def test_long_texts_leave_the_interpreter_to_others() -> None:
    """A thread that tokenises must not keep the event loop from running."""
    tokenizer = Tokenizer(train_tokenizer())
    worker = threading.Thread(target=tokenizer.encode, args=("the quick brown fox " * 30_000,), kwargs={"add_special_tokens": False})
    worker.start()
    num_turns = 0
    while worker.is_alive():
        worker.join(0.001)
        num_turns += 1
    assert num_turns > 20


async def test_a_prompt_of_100k_tokens_leaves_the_loop_to_others() -> None:
    """Code is full of "<", where each of a thousand special tokens might begin."""
    backend = train_tokenizer()
    backend.add_special_tokens([AddedToken(f"<|reserved_special_token_{number}|>") for number in range(1000)])
    tokenizer = Tokenizer(backend)
    model = ServedModel(ModelCard("m", "LlamaForCausalLM", 1 << 22, backend.get_vocab_size()), tokenizer)
    text = "if a<b: <tag> the quick fox\n" * 15_000
    with ThreadPoolExecutor(1) as executor:
        validating = asyncio.create_task(Validator(model, executor).validate(pb.GenerateRequest(text=text), "r"))
        num_turns = 0
        while not validating.done():
            await asyncio.sleep(0.001)
            num_turns += 1
    request = await validating
    assert len(request.prompt_token_ids) > 100_000
    assert num_turns > 20
    assert list(request.prompt_token_ids) == backend.encode(text).ids


def test_tokens_that_begin_alike_are_found_as_the_tokenizer_finds_them() -> None:
    """The longest wins, also where a shorter one is its beginning."""
    names = ["<a", "<ab", "<abc>", "<abd>", "<", "<<", "[x]", "[x", "x.y", "x*", "é<", "é"]
    backend = train_tokenizer()
    backend.add_special_tokens([AddedToken(name) for name in names])
    tokenizer = Tokenizer(backend)
    draw = random.Random(8)
    for _ in range(2000):
        text = "".join(draw.choices("<abcd>[x].y*é ", k=draw.randrange(16)))
        assert list(tokenizer.encode(text, add_special_tokens=False)) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_special_tokens_around_a_text_are_those_of_transformers(tmp_path: Path, settings: dict[str, bool]) -> None:
    folder = write_model(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = Tokenizer.load(folder)
    assert ours is not None
    for text in ("the quick fox", "<|im_start|>a <|im_end|>"):
        assert list(ours.encode(text, add_special_tokens=True)) == theirs(text)["input_ids"]


@pytest.mark.parametrize(("setting", "prefix"), [(True, [0]), (False, []), (None, [])])
def test_the_configured_bos_is_added_where_the_tokenizer_adds_nothing(tmp_path: Path, setting: bool | None, prefix: list[int]) -> None:
    folder = write_model(tmp_path)
    backend = train_tokenizer()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "add_bos_token": setting}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    bare = list(tokenizer.encode("the fox", add_special_tokens=False))
    assert list(tokenizer.encode("the fox", add_special_tokens=True)) == [*prefix, *bare]


def test_a_suffix_and_stored_truncation() -> None:
    backend = train_tokenizer()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ids = Tokenizer(backend).encode("the quick brown fox jumps", add_special_tokens=True)
    assert (ids[0], ids[-1]) == (0, 1)
    assert 4 < len(ids) < 64


def test_without_a_file_there_is_no_tokenizer_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
