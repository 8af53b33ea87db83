"""Requests of every kind through the front door and a real engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from protos import inference_pb2 as pb
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.conftest import Setup, ids_request, tokens_of
from tests.runtime.frontdoor.fake_engine import eventually
from tests.runtime.frontdoor.real_engine import RealEngine, expected

PROMPT = list(range(60, 100))


def scored(events: list[pb.GenerateEvent]) -> list[int]:
    """The token ids of the prompt positions that were scored, in order."""
    return [position.entries[0].token_id for event in events for position in event.tokens.prompt_logprobs]


async def test_text_chat_and_ids_of_the_same_tokens_are_one_request(run_engines: Callable[..., Any], tokenizer: Tokenizer) -> None:
    async with run_engines(RealEngine()) as setup:
        sampling = pb.SamplingParams(max_tokens=6, ignore_eos=True)
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="the quick fox")])
        for request, question in (
            (pb.GenerateRequest(text="the quick fox", sampling=sampling), pb.TokenizeRequest(text="the quick fox")),
            (pb.GenerateRequest(messages=chat, sampling=sampling), pb.TokenizeRequest(messages=chat)),
        ):
            ids = list((await setup.stub.Tokenize(question, timeout=5)).token_ids)
            answers = [await setup.generate(request), await setup.generate(ids_request(ids, max_tokens=6, ignore_eos=True))]
            assert [tokens_of(events) for events in answers] == [expected(ids, 6)] * 2
            text = "".join(event.tokens.text for event in answers[0])
            assert text == (await setup.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens_of(answers[0])), timeout=5)).text
            assert answers[1][0].started.num_cached_tokens == (len(ids) - 1) // 4 * 4


@pytest.mark.parametrize(("start", "reused", "first"), [(0, 0, 1), (1, 0, 1), (20, 16, 20), (21, 20, 21), (39, 36, 39)])
async def test_prompt_logprobs_start_where_they_are_asked_for(run_engines: Callable[..., Any], start: int, reused: int, first: int) -> None:
    """Reuse stops before the first scored position, whose logits must be computed; blocks have 4 tokens."""
    async with run_engines(RealEngine(max_num_batched_tokens=16)) as setup:
        await setup.generate(ids_request(PROMPT, max_tokens=1, ignore_eos=True))
        events = await setup.generate(
            ids_request(PROMPT, max_tokens=3, ignore_eos=True, prompt_logprobs=0, prompt_logprobs_start=start, logprobs=0)
        )
        assert events[0].started.num_cached_tokens == reused
        assert scored(events) == PROMPT[first:]
        assert tokens_of(events) == expected(PROMPT, 3)
        chosen = [position.entries[0].token_id for event in events for position in event.tokens.logprobs]
        assert chosen == expected(PROMPT, 3)


@pytest.fixture
async def replica(run_engines: Callable[..., Any]) -> Any:
    async with run_engines(RealEngine(step_s=0.001)) as setup:
        yield setup


async def test_a_stop_string_frees_the_engine_at_once(replica: Setup, tokenizer: Tokenizer) -> None:
    """The engine knows nothing of stop strings: it is told, and what it holds goes back."""
    tokens = expected(PROMPT, 100)
    texts = [tokenizer.decode([token]) for token in tokens]
    index = next(index for index in range(5, 60) if texts[index].strip() and texts[index] not in tokenizer.decode(tokens[:index]))
    events = await replica.generate(ids_request(PROMPT, max_tokens=100, ignore_eos=True, stop=[texts[index]]))
    finished = events[-1].finished
    assert (finished.reason, finished.stop_match) == (pb.STOP, texts[index])
    assert finished.usage.num_completion_tokens == index + 1
    assert tokens_of(events) == tokens[: index + 1]
    assert "".join(event.tokens.text for event in events) == tokenizer.decode(tokens[:index])
    await eventually(replica.engines[0].is_idle)
