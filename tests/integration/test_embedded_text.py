"""Text and chat on the embedded models through a front door: gRPC in, a real engine over real ranks, text out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from protos import inference_pb2 as pb
from runtime.client import Completion, InferenceClient
from runtime.engine.server import EngineServer
from runtime.frontdoor.config import FrontDoorConfig
from runtime.frontdoor.server import FrontDoor
from runtime.loop import LoopThread
from runtime.routing.types import Membership, ReplicaMember
from tests.integration import embedded
from tests.integration.replicas import SECRET, Replica, await_true, worker_config
from workers.local import RankPool

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SAMPLING = pb.SamplingParams(temperature=0.0, max_tokens=40)
MESSAGES = (
    ("system", "You are a helpful assistant that writes Python."),
    ("user", "Write a function named read_json: Read a JSON file and return its content."),
)


@contextlib.contextmanager
def served(pool: RankPool, name: str) -> Iterator[InferenceClient]:
    """A front door over one replica of the model."""
    worker = worker_config(embedded.folder(name), block_size=None, kv_memory_bytes=128 << 20)
    with contextlib.ExitStack() as stack:
        server = EngineServer(secret=SECRET)
        stack.callback(server.stop)
        replica = stack.enter_context(Replica(pool, worker, sink=server.deliver))
        port = server.start(replica.engine)
        thread = LoopThread("frontdoor")
        stack.callback(thread.close)
        door = FrontDoor(FrontDoorConfig(worker.model, secret=SECRET))
        address = thread.run(door.start(), 30.0)
        stack.callback(lambda: thread.run(door.stop(0.0), 30.0))
        member = ReplicaMember(replica.engine.config.replica_id, f"127.0.0.1:{port}", "ready")
        thread.run(door.set_membership(Membership(1, (member,))), 10.0)
        client = stack.enter_context(InferenceClient(address))
        await_true(lambda: [row.state for row in client.status().replicas] == ["ready"], lambda: str(client.status()))
        yield client


@pytest.fixture(scope="module")
def by_transformers() -> Callable[[str], Any]:
    """Its tokenizer of a model's folder."""
    import transformers

    return functools.cache(lambda name: transformers.AutoTokenizer.from_pretrained(embedded.folder(name)))


def check(name: str, tokenizer: Any, prompt: list[int], completion: Completion) -> None:
    """Greedy as transformers' model, text as its tokenizer; the end token counts, but has no text."""
    assert completion.usage["prompt_tokens"] == len(prompt)
    embedded.assert_greedy(name, prompt, completion.token_ids)
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert completion.text.strip()
    ended = completion.token_ids[-1] in (1, 5)  # <|eos|> and <|end|>, as generation_config.json says
    assert (completion.finish_reason, len(completion.token_ids) < SAMPLING.max_tokens) == (("stop", True) if ended else ("length", False))


@pytest.mark.parametrize("name", embedded.NAMES)
def test_text_and_chat(pool: RankPool, by_transformers: Callable[[str], Any], name: str) -> None:
    tokenizer = by_transformers(name)
    chat = [{"role": role, "content": content} for role, content in MESSAGES]
    chat_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    text_ids = tokenizer.encode("def read_json(path):")
    with served(pool, name) as client:
        messages = pb.ChatMessages(messages=[pb.ChatMessage(**message) for message in chat])
        answer = client.generate(pb.GenerateRequest(messages=messages, sampling=SAMPLING), 60.0)
        check(name, tokenizer, chat_ids, answer)
        assert "def read_json(" in answer.text
        check(name, tokenizer, text_ids, client.generate(pb.GenerateRequest(text="def read_json(path):", sampling=SAMPLING), 60.0))
