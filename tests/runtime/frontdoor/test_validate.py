from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cache_store.errors import MobulaError
from protos import inference_pb2 as pb
from runtime.errors import BadRequest, NoTokenizer, UnknownModel
from runtime.frontdoor.validate import MAX_STOPS, Validator, check_request_id
from runtime.request import ValidRequest
from runtime.text.model_card import load_served_model
from tests.runtime.frontdoor.conftest import Setup, ids_request, status_of
from tests.runtime.frontdoor.model_folder import MAX_MODEL_LEN, write_model
from workers.errors import UnsupportedConfig


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def validator(folder: Path, executor: ThreadPoolExecutor) -> Validator:
    return Validator(load_served_model(folder), executor, model_names=("tiny",))


async def accept(validator: Validator, request: pb.GenerateRequest) -> ValidRequest:
    return await validator.validate(request, "id")


def sampled(**sampling: Any) -> pb.GenerateRequest:
    return ids_request([5, 6, 7], **sampling)


def chat(*turns: tuple[str, str], **fields: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(messages=pb.ChatMessages(messages=messages, **fields))


BAD = [
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("token_ids", ids_request([])),
    ("token_ids", ids_request([5, 100_000])),
    ("token_ids", ids_request([5] * MAX_MODEL_LEN)),
    ("text", pb.GenerateRequest(text="word " * 4000)),
    ("messages", chat()),
    ("messages[1].role", chat(("user", "a"), ("robot", "b"))),
    ("messages", chat(("user", "refuse"))),
    ("tools_json", chat(("user", "a"), tools_json="{")),
    ("tools_json", chat(("user", "a"), tools_json="{}")),
    ("tools_json", chat(("user", "a"), tools_json="[" * 100_000)),
    ("documents_json", chat(("user", "a"), documents_json="1")),
    *(("pin_ttl_s", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), pin_ttl_s=ttl_s)) for ttl_s in (-0.5, math.nan, math.inf)),
    ("cache_salt", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), cache_salt="x" * 2000)),
    ("max_tokens", sampled(max_tokens=0)),
    ("max_tokens", sampled(max_tokens=MAX_MODEL_LEN)),
    ("temperature", sampled(temperature=-0.1)),
    ("temperature", sampled(temperature=math.nan)),
    ("temperature", sampled(temperature=math.inf)),
    ("top_k", sampled(top_k=-2)),
    ("top_p", sampled(top_p=0)),
    ("top_p", sampled(top_p=1.1)),
    ("top_p", sampled(top_p=math.nan)),
    ("min_p", sampled(min_p=-0.1)),
    ("min_p", sampled(min_p=1.1)),
    ("repetition_penalty", sampled(repetition_penalty=0)),
    ("repetition_penalty", sampled(repetition_penalty=math.inf)),
    ("presence_penalty", sampled(presence_penalty=2.5)),
    ("frequency_penalty", sampled(frequency_penalty=-2.5)),
    ("frequency_penalty", sampled(frequency_penalty=-math.inf)),
    ("logprobs", sampled(logprobs=-1)),
    ("logprobs", sampled(logprobs=21)),
    ("prompt_logprobs", sampled(prompt_logprobs=21)),
    ("prompt_logprobs_start", sampled(prompt_logprobs_start=1)),
    ("prompt_logprobs_start", sampled(prompt_logprobs=0, prompt_logprobs_start=3)),
    ("stop", sampled(stop=[""])),
    ("stop", sampled(stop=["x" * 2000])),
    ("stop", sampled(stop=["x"] * (MAX_STOPS + 1))),
    ("stop_token_ids", sampled(stop_token_ids=[100_000])),
    ("stop_token_ids", sampled(stop_token_ids=[5] * 2000)),
]


@pytest.mark.parametrize(("field", "request_"), BAD, ids=[f"{field}-{index}" for index, (field, _) in enumerate(BAD)])
async def test_a_bad_request_names_its_field(validator: Validator, field: str, request_: pb.GenerateRequest) -> None:
    with pytest.raises(BadRequest) as caught:
        await accept(validator, request_)
    assert str(caught.value).startswith(f"{field}: ")


async def test_bad_requests_are_invalid_arguments_over_the_wire(one: Setup) -> None:
    for field, request in BAD:
        error = await status_of(one.stub.Generate(request, timeout=5))
        assert (error.code().name, error.details().startswith(f"{field}: ")) == ("INVALID_ARGUMENT", True)
    unknown = sampled()
    unknown.model = "other"
    assert (await status_of(one.stub.Generate(unknown, timeout=5))).code().name == "NOT_FOUND"
    long_id = sampled()
    long_id.request_id = "x" * 300
    assert (await status_of(one.stub.Generate(long_id, timeout=5))).details().startswith("request_id: ")
    assert not one.engines[0].submitted


async def test_the_edges_are_valid(validator: Validator) -> None:
    request = sampled(
        temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, logprobs=20, max_tokens=MAX_MODEL_LEN - 3
    )
    valid = await accept(validator, request)
    assert (valid.sampling.temperature, valid.sampling.top_k, valid.sampling.num_logprobs) == (0, 0, 20)
    assert valid.stop.max_tokens == MAX_MODEL_LEN - 3
    assert (await accept(validator, sampled())).stop.max_tokens == MAX_MODEL_LEN - 3
    assert list((await accept(validator, ids_request([5] * (MAX_MODEL_LEN - 1)))).prompt_token_ids) == [5] * (MAX_MODEL_LEN - 1)


async def test_a_temperature_next_to_zero_is_greedy(validator: Validator) -> None:
    assert (await accept(validator, sampled(temperature=1e-30))).sampling.temperature == 0
    assert (await accept(validator, sampled(temperature=1e-4))).sampling.temperature == pytest.approx(1e-4)


async def test_what_the_replicas_hold_limits_the_context(folder: Path, executor: ThreadPoolExecutor) -> None:
    limits: list[int | None] = [None, 20]
    validator = Validator(load_served_model(folder), executor, lambda: limits[-1])
    assert (await accept(validator, sampled())).stop.max_tokens == 17
    limits.pop()
    assert (await accept(validator, sampled())).stop.max_tokens == MAX_MODEL_LEN - 3


async def test_a_model_may_have_several_names(folder: Path, executor: ThreadPoolExecutor) -> None:
    validator = Validator(load_served_model(folder), executor, model_names=("tiny", "tiny-latest"))
    request = sampled()
    for name in ("", "tiny", "tiny-latest"):
        request.model = name
        assert (await accept(validator, request)).request_id == "id"
    request.model = folder.name
    with pytest.raises(UnknownModel, match=r"^model: .*'tiny', 'tiny-latest'"):
        await accept(validator, request)


async def test_a_model_is_served_by_its_name_or_none(validator: Validator) -> None:
    request = sampled()
    for name in ("", "tiny"):
        request.model = name
        assert (await accept(validator, request)).request_id == "id"
    request.model = "other"
    with pytest.raises(UnknownModel, match=r"^model: 'other' .*'tiny'"):
        await accept(validator, request)


@pytest.mark.parametrize("request_", [pb.GenerateRequest(text="hi"), chat(("user", "hi")), sampled(stop=["x"])])
async def test_without_a_tokenizer_only_token_ids_are_served(
    tmp_path: Path, executor: ThreadPoolExecutor, request_: pb.GenerateRequest
) -> None:
    validator = Validator(load_served_model(write_model(tmp_path, tokenizer=False)), executor)
    with pytest.raises(NoTokenizer):
        await accept(validator, request_)
    assert await accept(validator, sampled())


async def test_without_a_chat_template_messages_are_refused(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    validator = Validator(load_served_model(write_model(tmp_path, chat=False)), executor)
    with pytest.raises(NoTokenizer, match="chat template"):
        await accept(validator, chat(("user", "hi")))
    assert await accept(validator, pb.GenerateRequest(text="hi"))


async def test_defaults_come_from_the_generation_config(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [3, 7], "min_p": None}
    validator = Validator(load_served_model(write_model(tmp_path, generation=generation)), executor)
    valid = await accept(validator, sampled(top_p=0.5))
    assert (valid.sampling.temperature, valid.sampling.top_k, valid.sampling.repetition_penalty) == (0.6, 20, 1.05)
    assert (valid.sampling.top_p, valid.sampling.min_p) == (0.5, 0.0)
    assert valid.stop.end_token_ids == {1, 3, 7}
    assert (await accept(validator, sampled(ignore_eos=True, stop_token_ids=[9]))).stop.end_token_ids == {9}


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match="temperature"):
        load_served_model(write_model(tmp_path / "a", generation={"temperature": "hot"}))
    with pytest.raises(UnsupportedConfig, match="eos_token_id"):
        load_served_model(write_model(tmp_path / "b", generation={"eos_token_id": ["x"]}))


async def test_seeds_are_kept_or_drawn(validator: Validator) -> None:
    assert [(await accept(validator, sampled(seed=seed))).sampling.seed for seed in (0, 7, -1)] == [0, 7, 2**64 - 1]
    assert (await accept(validator, sampled())).sampling.seed != (await accept(validator, sampled())).sampling.seed


def test_request_ids() -> None:
    assert check_request_id("mine") == "mine"
    assert check_request_id("") != check_request_id("")
    with pytest.raises(MobulaError, match=r"^request_id: "):
        check_request_id("x" * 257)
