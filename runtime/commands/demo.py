"""`mobula demo`: the main job on the embedded model, small enough for a laptop.

Two replicas of two ranks each, a front door, a store and a controller on a local Ray cluster. Requests share a long system
prompt; the table shows, for each, how many prompt tokens came from the replica's own pages, from the store, and were computed.
Raises DemoFailed unless the first was computed, a later one on the same replica hit pages, the first one on the other replica hit
dram, and equal prompts had equal answers.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from protos import inference_pb2 as pb
from runtime.client import Completion, InferenceClient
from runtime.commands.memory import tree_memory_bytes
from runtime.commands.progress import LoadProgress
from runtime.config import EMBEDDED_MODELS, ServeSettings
from runtime.controller.deployment import deployed
from runtime.errors import MobulaError
from workers.models.config import load_model_config

READY_TIMEOUT_S = 120.0
OFFER_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 60.0
NUM_SYSTEM_TOKENS, NUM_QUESTION_TOKENS = 512, 16  # for a model without a tokenizer

SYSTEM_PROMPT = " ".join(
    f"Rule {number}: answer questions about module {name} in one short line, name the function, and say what it returns."
    for number, name in enumerate(("os", "re", "json", "math", "time", "random", "string", "pathlib", "itertools", "functools") * 2, 1)
)
QUESTIONS = ("def read_json(path):", "def count_words(text):")


class DemoFailed(MobulaError):
    """Reuse did not happen as promised; the message says which promise."""


class Turn(NamedTuple):
    """One request of the demo and what must be true of it."""

    question: int
    expect: str  # "computed", "dram" or "pages": where most of its prompt must come from


# Round robin over two replicas: turns 0, 2, 4 go to the first, 1, 3, 5 to the second.
TURNS = (Turn(0, "computed"), Turn(0, "dram"), Turn(0, "pages"), Turn(1, "pages"), Turn(1, "pages"), Turn(0, "pages"))


@dataclass(frozen=True, slots=True)
class Answered:
    turn: Turn
    completion: Completion

    def tokens_from(self, source: str) -> int:
        usage = self.completion.usage
        if source == "computed":
            return int(usage["prompt_tokens"] - usage["cached_tokens"])
        return int(usage["cached_tokens_by_tier"][source])


def demo(settings: ServeSettings, console: Console) -> None:
    began = time.monotonic()
    settings = replace(settings, model=settings.model or str(EMBEDDED_MODELS / "mla"), policy="round_robin", port=0)
    if not any(Path(settings.model).glob("*.safetensors")):
        settings = replace(settings, load_format="dummy")
    with deployed(settings) as deployment:
        with LoadProgress(console) as progress:
            report = deployment.wait_ready(READY_TIMEOUT_S, progress.show)
        console.print(f"ready {report.endpoint} after {time.monotonic() - began:.1f} s", highlight=False)
        with InferenceClient(report.endpoint) as client:
            answers = []
            for turn in TURNS:
                answers.append(Answered(turn, client.generate(_request(Path(settings.model), turn), REQUEST_TIMEOUT_S)))
                wait_for_offers(client, OFFER_TIMEOUT_S)
        memory_bytes = tree_memory_bytes()
    console.print(_table(answers))
    _print_text(console, answers)
    console.print(f"{time.monotonic() - began:.1f} s in all, {memory_bytes / 2**30:.2f} GiB at the end of the run", highlight=False)
    check_promises(answers)


def _request(model: Path, turn: Turn) -> pb.GenerateRequest:
    """Text where the model has a tokenizer, else made-up token ids."""
    request = pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0.0, max_tokens=32))
    if (model / "tokenizer.json").exists():
        request.text = f"{SYSTEM_PROMPT}\n\n{QUESTIONS[turn.question]}"
    else:
        vocab_size = load_model_config(str(model)).vocab_size
        system = random.Random(0).choices(range(2, vocab_size), k=NUM_SYSTEM_TOKENS)
        question = random.Random(1 + turn.question).choices(range(2, vocab_size), k=NUM_QUESTION_TOKENS)
        request.token_ids.ids.extend([*system, *question])
        request.sampling.ignore_eos = True
    return request


def wait_for_offers(client: InferenceClient, timeout_s: float) -> None:
    """Until every full block has been offered to the store. DemoFailed when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while any(replica.blocks_pending_offer for replica in client.status().replicas):
        if time.monotonic() > deadline:
            raise DemoFailed(f"blocks were still waiting to be stored after {timeout_s:.0f} s")
        time.sleep(0.02)


def check_promises(answers: list[Answered]) -> None:
    """Raises DemoFailed with the first promise that was not kept."""
    for number, answer in enumerate(answers, 1):
        prompt_tokens = answer.completion.usage["prompt_tokens"]
        expected = answer.tokens_from(answer.turn.expect)
        if expected * 2 <= prompt_tokens:
            raise DemoFailed(
                f"request {number} should mostly have been {answer.turn.expect}: {expected} of {prompt_tokens} prompt tokens were"
            )
    if answers[0].completion.replica_id != answers[2].completion.replica_id:
        raise DemoFailed("requests 1 and 3 were to run on the same replica")
    if answers[0].completion.replica_id == answers[1].completion.replica_id:
        raise DemoFailed("requests 1 and 2 were to run on different replicas")
    by_question: dict[int, list[int]] = {}
    for number, answer in enumerate(answers, 1):
        first = by_question.setdefault(answer.turn.question, answer.completion.token_ids)
        if answer.completion.token_ids != first:
            raise DemoFailed(f"request {number} got other tokens than the earlier request with the same prompt")


def _table(answers: list[Answered]) -> Table:
    """75 columns wide, so that nothing is cut where the output is piped."""
    table = Table(title="one system prompt, two replicas, one store")
    for column in ("request", "replica", "prompt", "TTFT\nms", "prompt\ntokens", "from\npages", "from\nstore", "computed"):
        table.add_column(column, justify="left" if column == "replica" else "right", no_wrap=True)
    for number, answer in enumerate(answers, 1):
        completion = answer.completion
        sources = (answer.tokens_from("pages"), answer.tokens_from("dram"), answer.tokens_from("computed"))
        table.add_row(
            str(number),
            completion.replica_id,
            "AB"[answer.turn.question],
            f"{completion.timings['ttft_s'] * 1e3:.0f}",
            str(completion.usage["prompt_tokens"]),
            *(str(source) for source in sources),
        )
    return table


def _print_text(console: Console, answers: list[Answered]) -> None:
    seen = set()
    for answer in answers:
        if answer.completion.text and answer.turn.question not in seen:
            seen.add(answer.turn.question)
            text = QUESTIONS[answer.turn.question] + answer.completion.text
            console.print(f"prompt {'AB'[answer.turn.question]} ends: {text}", highlight=False, markup=False)
