"""A raw request to a `ValidRequest`, or an error that names the field. Nothing later judges input again."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from array import array
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from protos import inference_pb2 as pb
from runtime.errors import BadRequest, NoTokenizer, UnknownModel
from runtime.request import StopConditions, ValidRequest
from runtime.text.model_card import SamplingDefaults, ServedModel
from runtime.text.tokenizer import Tokenizer
from workers.step import SamplingSettings

MAX_ID_CHARS = 256
MAX_SALT_CHARS = 1024
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below it logits would overflow, and the draw is the largest one's anyway
ROLES = ("system", "user", "assistant", "tool")
_INLINE_SIZE = 2048  # shorter texts, or fewer tokens, are done with in less time than a thread takes to answer

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "at least 0"),
    "top_k": (lambda value: value >= -1, "at least 1, or 0 or -1 for all tokens"),
    "top_p": (lambda value: 0 < value <= 1, "greater than 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: value > 0, "greater than 0"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "between -2 and 2"),
    "logprobs": (lambda value: 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": (lambda value: 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "max_tokens": (lambda value: value >= 1, "at least 1"),
}


class Validator:
    def __init__(
        self,
        model: ServedModel,
        executor: Executor,
        max_model_len: Callable[[], int | None] = lambda: None,
        model_names: tuple[str, ...] = (),
    ) -> None:
        """`executor` tokenises long texts. `max_model_len`: what the replicas can hold, None while that is unknown. `model_names`: what
        requests may call the model; none given: the card's name.
        """
        self.model_names = model_names or (model.card.name,)
        self._model = model
        self._executor = executor
        self._replicas_max_len = max_model_len

    @property
    def max_model_len(self) -> int:
        return min(self._model.card.max_model_len, self._replicas_max_len() or self._model.card.max_model_len)

    async def validate(
        self, request: pb.GenerateRequest, request_id: str, *, tenant: str = "", deadline_s: float | None = None
    ) -> ValidRequest:
        """BadRequest, UnknownModel or NoTokenizer. `deadline_s`: time.monotonic() by which the output must be complete."""
        self.check_model(request.model)
        if len(request.cache_salt) > MAX_SALT_CHARS:
            raise BadRequest(f"cache_salt: must be at most {MAX_SALT_CHARS} characters, not {len(request.cache_salt)}")
        if not math.isfinite(request.pin_ttl_s) or request.pin_ttl_s < 0:
            raise BadRequest(f"pin_ttl_s: must be a number of seconds, at least 0, not {request.pin_ttl_s:g}")
        _check_ranges(request.sampling)
        self._check_stops(request.sampling)
        prompt = await self._prompt(request)
        return ValidRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=_sampling(request.sampling, self._model.card.defaults, len(prompt)),
            stop=self._stop_conditions(request, len(prompt)),
            tenant=tenant,
            cache_salt=request.cache_salt,
            deadline_s=deadline_s,
            pin_ttl_s=request.pin_ttl_s,
        )

    def check_model(self, name: str) -> None:
        """UnknownModel unless `name` is empty or one of those served."""
        if name and name not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            raise UnknownModel(f"model: {name[:MAX_ID_CHARS]!r} is not served here; served: {served}")

    async def tokenize(self, request: pb.TokenizeRequest) -> array[int]:
        self.check_model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise BadRequest("input: give text or messages")
        return await (self._encode(request.text, chat=False) if kind == "text" else self._chat(request.messages))

    async def detokenize(self, request: pb.DetokenizeRequest) -> str:
        self.check_model(request.model)
        decode = self._tokenizer("token_ids").decode
        if len(request.token_ids) <= _INLINE_SIZE:
            return decode(request.token_ids)
        return await asyncio.get_running_loop().run_in_executor(self._executor, decode, list(request.token_ids))

    async def _prompt(self, request: pb.GenerateRequest) -> array[int]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise BadRequest("prompt: give one of text, token_ids and messages")
        if kind == "token_ids":
            self._check_length(kind, len(request.token_ids.ids))  # before anything is done with millions of them
            prompt = array("I", request.token_ids.ids)
        elif kind == "text":
            if not request.text:
                raise BadRequest("text: must not be empty")
            prompt = await self._encode(request.text, chat=False)
        else:
            prompt = await self._chat(request.messages)
        if not prompt:
            raise BadRequest(f"{kind}: must hold at least one token")
        self._check_length(kind, len(prompt))
        vocab_size = self._model.card.vocab_size
        largest = int(np.frombuffer(prompt, np.uint32).max())  # max() would hold the loop up for milliseconds on a long prompt
        if largest >= vocab_size:
            raise BadRequest(f"{kind}: token id {largest} is outside the vocabulary of {vocab_size}")
        return prompt

    def _check_length(self, field: str, num_tokens: int) -> None:
        if num_tokens >= self.max_model_len:
            raise BadRequest(f"{field}: a prompt of {num_tokens} tokens leaves no room for output in a context of {self.max_model_len}")

    async def _chat(self, chat: pb.ChatMessages) -> array[int]:
        template = self._model.chat
        if template is None:
            self._tokenizer("messages")
            raise NoTokenizer("messages: the model has no chat template; send text or token ids")
        if not chat.messages:
            raise BadRequest("messages: must hold at least one message")
        for index, message in enumerate(chat.messages):
            if message.role not in ROLES:
                raise BadRequest(f"messages[{index}].role: must be one of {', '.join(ROLES)}, not {message.role!r}")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        tools, documents = _json_list("tools_json", chat.tools_json), _json_list("documents_json", chat.documents_json)
        if chat.ByteSize() <= _INLINE_SIZE:
            text = template.render(messages, tools, documents)
        else:
            text = await asyncio.get_running_loop().run_in_executor(self._executor, template.render, messages, tools, documents)
        return await self._encode(text, chat=True)

    async def _encode(self, text: str, *, chat: bool) -> array[int]:
        tokenizer = self._tokenizer("text")
        if len(text) <= _INLINE_SIZE:
            return tokenizer.encode(text, add_special_tokens=not chat)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: tokenizer.encode(text, add_special_tokens=not chat))

    def _tokenizer(self, field: str) -> Tokenizer:
        if self._model.tokenizer is None:
            raise NoTokenizer(f"{field}: the model has no tokenizer.json; only token ids without stop strings are served")
        return self._model.tokenizer

    def _check_stops(self, sampling: pb.SamplingParams) -> None:
        if len(sampling.stop) > MAX_STOPS:
            raise BadRequest(f"stop: at most {MAX_STOPS} strings are looked for, not {len(sampling.stop)}")
        if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in sampling.stop):
            raise BadRequest(f"stop: every string must have between 1 and {MAX_STOP_CHARS} characters")
        if sampling.stop:
            self._tokenizer("stop")
        if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise BadRequest(f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS} are looked for, not {len(sampling.stop_token_ids)}")
        vocab_size = self._model.card.vocab_size
        for token_id in sampling.stop_token_ids:
            if token_id >= vocab_size:
                raise BadRequest(f"stop_token_ids: token id {token_id} is outside the vocabulary of {vocab_size}")

    def _stop_conditions(self, request: pb.GenerateRequest, num_prompt_tokens: int) -> StopConditions:
        sampling, room = request.sampling, self.max_model_len - num_prompt_tokens
        max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
        if max_tokens > room:
            raise BadRequest(
                f"max_tokens: {num_prompt_tokens} prompt tokens and {max_tokens} new ones do not fit a context of {self.max_model_len}; "
                f"at most {room} do"
            )
        stop_token_ids = frozenset(sampling.stop_token_ids)
        eos = frozenset() if sampling.ignore_eos else self._model.card.eos_token_ids
        return StopConditions(max_tokens, eos | stop_token_ids, stop_token_ids, tuple(dict.fromkeys(sampling.stop)))


def check_request_id(request_id: str) -> str:
    """The id, or a new one where it is empty. BadRequest when it is too long."""
    if len(request_id) > MAX_ID_CHARS:
        raise BadRequest(f"request_id: must be at most {MAX_ID_CHARS} characters, not {len(request_id)}")
    return request_id or secrets.token_hex(16)


def _check_ranges(sampling: pb.SamplingParams) -> None:
    for name, (is_valid, wanted) in _RANGES.items():
        if sampling.HasField(name):
            value = getattr(sampling, name)
            if not math.isfinite(value) or not is_valid(value):
                raise BadRequest(f"{name}: must be {wanted}, not {value:g}")
    if sampling.HasField("prompt_logprobs_start") and not sampling.HasField("prompt_logprobs"):
        raise BadRequest("prompt_logprobs_start: means nothing without prompt_logprobs")


def _sampling(sampling: pb.SamplingParams, defaults: SamplingDefaults, num_prompt_tokens: int) -> SamplingSettings:
    if sampling.prompt_logprobs_start >= num_prompt_tokens:
        raise BadRequest(
            f"prompt_logprobs_start: must be below the prompt's {num_prompt_tokens} tokens, not {sampling.prompt_logprobs_start}"
        )
    stated = {name: getattr(sampling, name) for name in SamplingDefaults._fields if sampling.HasField(name)}
    chosen = defaults._replace(**stated)
    return SamplingSettings(
        repetition_penalty=chosen.repetition_penalty,
        presence_penalty=chosen.presence_penalty,
        frequency_penalty=chosen.frequency_penalty,
        temperature=0.0 if chosen.temperature < MIN_TEMPERATURE else chosen.temperature,
        min_p=chosen.min_p,
        top_k=max(0, chosen.top_k),
        top_p=chosen.top_p,
        seed=sampling.seed % 2**64 if sampling.HasField("seed") else secrets.randbits(64),
        num_logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        num_prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        prompt_logprobs_start=sampling.prompt_logprobs_start,
    )


def _json_list(field: str, text: str) -> list[Any] | None:
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{field}: is not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise BadRequest(f"{field}: must be a JSON list")
    return value
