"""Thousands of random requests through a whole engine, against ranks and a store that check every move (simulated_group, simulated_store).

Every run ends with the same questions: did each request get the tokens that a sequential model gives it, are all pages and leases back,
and do the checkers agree.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest
from simulated_group import VOCAB, Clock, SimulatedGroup, extend_chain, make_info, next_token
from simulated_store import SimulatedStore

from cache_store.keys import salted_root
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.live import EngineRequest, RequestKey
from runtime.engine.rates import ReplicaRates
from workers.step import SamplingSettings

TENANTS = ("", "blue")
MAX_IDLE_STEPS = 3000
NUM_SEEDS = 6


@dataclass
class Shape:
    """What a run is made of."""

    num_requests: int = 80
    num_prefixes: int = 12
    num_pages: int = 40
    block_size: int = 4
    max_model_len: int = 64
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 16
    max_prompt_tokens_beside_outputs: int = 16
    pipeline_depth: int = 2
    with_store: bool = True
    num_slots: int = 150
    refusals: float = 0.1
    copy_failures: float = 0.05
    restarts: float = 0.0
    aborts: float = 0.01
    arrivals: float = 0.3
    lateness: float = 0.5
    prefix_caching: bool = True
    elsewhere: float = 0.0


@dataclass
class Told:
    """What a front door heard of one request."""

    token_ids: list[int] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)
    num_logprobs: int = 0
    cached: list[int] | None = None
    receipt: list[object] | None = None
    finish_reason: str | None = None
    error: list[str] | None = None
    abort_reason: str | None = None
    num_kept: int = 0

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, output: RequestOutput) -> None:
        assert not self.is_over, "an output after the last one"
        assert (self.cached is None) == (output.cached is not None), "cached comes with the first output, and only then"
        self.cached, self.receipt = self.cached or output.cached, self.receipt or output.receipt
        self.token_ids += output.token_ids
        self.num_logprobs += len(output.logprobs or ())
        self.scored += [entry[0][1] for entry in output.prompt_logprobs or ()]
        self.finish_reason, self.error = output.finish_reason, output.error


def expected_output(request: EngineRequest, max_model_len: int) -> tuple[list[int], str]:
    """The sequential model: one token after the other, new ones only."""
    tokens = [*request.prompt, *request.output]
    chain: list[int] = []
    extend_chain(chain, tokens)
    new: list[int] = []
    limit = min(len(request.prompt) + request.max_tokens, max_model_len)
    while len(tokens) + len(new) < limit:
        new.append(next_token(chain[-1]))
        extend_chain(chain, new[-1:])
        if new[-1] in request.end_token_ids:
            return new, "stop"
    return new, "length"


class Run:
    def __init__(self, seed: int, shape: Shape) -> None:
        self.rng = rng = random.Random(seed)
        self.shape = shape
        self.clock = Clock()
        info = make_info(shape.num_pages, shape.block_size, shape.max_model_len)
        self.group = SimulatedGroup(info, rng, self.clock, copy_failures=shape.copy_failures, lateness=shape.lateness)
        self.store = (
            SimulatedStore(rng, shape.num_slots, set(), refusals=shape.refusals, elsewhere=shape.elsewhere) if shape.with_store else None
        )
        if self.store:
            self.store.group = self.group
        config = EngineConfig(
            incarnation=str(seed),
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_prompt_tokens_beside_outputs=shape.max_prompt_tokens_beside_outputs,
            pipeline_depth=shape.pipeline_depth,
            load_timeout_s=rng.choice((0.005, 0.05, 2.0)),
            lookup_ahead=4,
            max_loading_requests=3,
            max_loading_blocks=8,
            first_load_blocks=rng.choice((1, 2, 64)),
            max_saving_blocks=6,
            offer_batch_blocks=4,
            offer_retry_s=0.01,
            prefix_caching=shape.prefix_caching,
            single_flight_timeout_s=rng.choice((0.005, 0.5)),
            single_flight_poll_s=0.002,
        )
        self.requests: dict[RequestKey, EngineRequest] = {}
        self.told: dict[RequestKey, Told] = {}
        rates = ReplicaRates()
        rates.copy_bytes_per_s = rng.choice((0.0, 1e12))  # known: a lone request's step goes ahead of its copies
        self.engine = Engine(config, self.group, self.store, self.hear, rates=rates, clock=self.clock)
        root = self.engine.hello().root
        assert root is not None
        if self.store:
            self.store.roots |= {salted_root(root, tenant, "") for tenant in TENANTS}
        self.prefixes = [
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, shape.max_model_len * 3 // 4))] for _ in range(shape.num_prefixes)
        ]

    def hear(self, outputs: dict[int, list[RequestOutput]], _load: Load) -> None:
        for stream, batch in outputs.items():
            for output in batch:
                self.told[stream, output.request_id].take(output)

    def new_request(self) -> EngineRequest:
        rng, shape = self.rng, self.shape
        prefix = rng.choice(self.prefixes)
        prompt = prefix[: rng.choice((len(prefix), len(prefix), rng.randint(0, len(prefix))))] + [
            rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))
        ]
        prompt = prompt[: shape.max_model_len - 2]
        room = shape.max_model_len - len(prompt)
        sampling = SamplingSettings(
            num_logprobs=rng.choice((None, None, 0)),
            num_prompt_logprobs=rng.choice((None, None, None, 0)),
            prompt_logprobs_start=rng.choice((0, 0, rng.randrange(len(prompt) + 2))),
        )
        request = EngineRequest(
            stream=rng.randrange(3),
            request_id=f"r{len(self.requests)}",
            prompt=array("I", prompt),
            sampling=sampling,
            max_tokens=rng.choice((0, 1, rng.randint(1, room), rng.randint(1, room), rng.randint(1, room), 2 * room)),
            end_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice((0, 1, 5)))),
            tenant=rng.choice(TENANTS),
            deadline_s=self.clock() + rng.uniform(0.01, 0.5) if rng.random() < 0.05 else None,
            pin_ttl_s=60.0 if rng.random() < 0.2 else 0.0,
        )
        if rng.random() < 0.1 and request.max_tokens > 1:
            done, _ = expected_output(request, shape.max_model_len)
            return EngineRequest(
                **{name: getattr(request, name) for name in EngineRequest.__slots__ if name != "output"},
                output=array("I", done[: len(done) // 2]),
            )
        return request

    def submit(self) -> None:
        request = self.new_request()
        self.requests[request.key] = request
        self.told[request.key] = Told()
        self.engine.submit(request)

    def meddle(self) -> None:
        """What happens to an engine from outside between two steps."""
        rng, shape, store = self.rng, self.shape, self.store
        if len(self.requests) < shape.num_requests and rng.random() < shape.arrivals:
            for _ in range(rng.choice((1, 1, 4))):
                self.submit()
        if rng.random() < shape.aborts and (live := [key for key, told in self.told.items() if not told.is_over]):
            key = rng.choice(live)
            told = self.told[key]
            told.abort_reason = rng.choice(("abort", "stop", "deadline"))
            told.num_kept = rng.randint(0, len(told.token_ids))
            self.engine.abort(key, told.abort_reason, told.num_kept)
        if store is None:
            return
        if rng.random() < 0.01:
            store.evict_one()
        if not store._is_up:
            if rng.random() < 0.2:
                store.come_up()
        elif rng.random() < shape.restarts:
            store.go_down()

    def step(self) -> None:
        self.meddle()
        self.engine.step()
        problems = self.engine.check()
        assert not problems, problems

    def run(self) -> None:
        while len(self.requests) < self.shape.num_requests or not all(told.is_over for told in self.told.values()):
            before = sum(len(told.token_ids) for told in self.told.values())
            for _ in range(MAX_IDLE_STEPS):
                self.step()
                if sum(len(told.token_ids) for told in self.told.values()) > before or all(told.is_over for told in self.told.values()):
                    break
            else:
                stats = self.engine.stats()
                raise AssertionError(f"nothing moves: {stats}")
        if self.store and not self.store._is_up:
            self.store.come_up()
        for _ in range(MAX_IDLE_STEPS):
            if self.is_settled():
                break
            self.engine.step()
        self.judge()

    def is_settled(self) -> bool:
        stats = self.engine.stats()
        return self.group.is_idle and not (stats.blocks_pending_offer or stats.leased_slots or stats.used_pages)

    def judge(self) -> None:
        stats = self.engine.stats()
        assert self.is_settled(), stats
        assert self.engine.check() == []
        assert self.engine.blocks.num_used == 0
        assert self.engine.loads.claims.num_blocks == 0
        assert stats.num_running == stats.num_waiting == 0
        assert self.engine.load == Load(0, 0, 0)
        if self.store:
            assert self.store.num_leases == 0
            assert self.engine.pins.num_kept <= self.store.num_pins
        for key, request in self.requests.items():
            self.judge_one(request, self.told[key])

    def judge_one(self, request: EngineRequest, told: Told) -> None:
        expected, reason = expected_output(request, self.shape.max_model_len)
        assert told.cached is not None
        assert sum(told.cached) <= len(request.prompt) - 1
        assert told.receipt is not None
        num_computed, bytes_loaded, reasons = told.receipt
        assert num_computed in (0, len(request.prompt) - sum(told.cached))
        assert sum(reasons.values()) == num_computed
        assert bytes_loaded or not told.cached[1]
        if told.error is not None:
            assert told.error[0] == "DeadlinePassed"
            assert request.deadline_s is not None or told.abort_reason == "deadline"
            assert told.token_ids == expected[: len(told.token_ids)]
        elif told.abort_reason is not None and (told.finish_reason, told.token_ids) != (reason, expected):
            assert told.finish_reason == told.abort_reason
            assert told.token_ids == expected[: len(told.token_ids)]
        else:
            assert told.token_ids == expected
            if request.output and request.output[-1] in request.end_token_ids:
                return
            assert told.finish_reason == reason
            if request.sampling.num_logprobs is not None:
                assert told.num_logprobs == len(expected)
            if request.sampling.num_prompt_logprobs is not None and not request.output:
                first = max(1, request.sampling.prompt_logprobs_start)
                assert told.scored == [float(position) for position in range(first, len(request.prompt))]


SHAPES = {
    "plain": Shape(with_store=False),
    "depth 1": Shape(pipeline_depth=1, with_store=False),
    "no caching": Shape(prefix_caching=False),
    "few pages": Shape(num_pages=18, with_store=False, arrivals=0.6),
    "few pages, store": Shape(num_pages=18, arrivals=0.6),
    "store": Shape(),
    "store, depth 1": Shape(pipeline_depth=1),
    "small store": Shape(num_slots=20, refusals=0.3),
    "failing copies": Shape(copy_failures=0.5),
    "restarting store": Shape(restarts=0.01, copy_failures=0.1, arrivals=0.1),
    "another replica": Shape(elsewhere=0.5, num_slots=40, num_pages=24),
    "another replica, aborts": Shape(elsewhere=0.5, aborts=0.05, num_slots=40, num_pages=24),
    "another replica, restarts": Shape(elsewhere=0.5, restarts=0.01, copy_failures=0.1, arrivals=0.1),
    "another replica, few at a time": Shape(
        elsewhere=0.5, arrivals=0.03, num_prefixes=3, num_slots=40, num_pages=24, copy_failures=0.2
    ),  # loads of what a row computes meanwhile, and steps ahead of them
    "restarts and few pages": Shape(restarts=0.005, num_pages=20, arrivals=0.1, aborts=0.03),
    "aborts": Shape(aborts=0.2, num_pages=24),
    "late results": Shape(lateness=0.9, num_pages=24),
    "prompt results": Shape(lateness=0.0, num_pages=24),
    "tiny budget": Shape(max_num_batched_tokens=3, max_num_seqs=8),
    "prompts behind outputs": Shape(max_num_batched_tokens=40, max_prompt_tokens_beside_outputs=3, num_pages=24),
    "big blocks": Shape(block_size=8, num_pages=14),
    "blocks of one": Shape(block_size=1, num_pages=80),
    "one at a time": Shape(arrivals=0.02, num_prefixes=3, num_pages=20, copy_failures=0.0),
    "one at a time, failing copies": Shape(arrivals=0.02, num_prefixes=3, num_pages=20, copy_failures=0.3),
    "few at a time, aborts, restarts": Shape(arrivals=0.03, aborts=0.03, restarts=0.01, num_prefixes=3, num_pages=20, copy_failures=0.2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_request_gets_its_own_tokens(name: str) -> None:
    preemptions = hits = loads = delivered = ahead = void = 0
    for seed in range(NUM_SEEDS):
        run = Run(seed, SHAPES[name])
        run.run()
        preemptions += run.engine.stats().num_preemptions
        ahead, void = ahead + run.group.num_ahead, void + run.group.num_void_rows
        delivered += run.store.num_delivered if run.store else 0
        hits += sum(sum(told.cached or ()) for told in run.told.values())
        loads += sum((told.cached or [0, 0])[1] for told in run.told.values())
    shape = SHAPES[name]
    assert (hits > 0) == shape.prefix_caching
    if shape.num_pages == 18:
        assert preemptions > 0, "the shape is there to preempt"
    if name.startswith("one at a time"):
        assert ahead > 10, "the shape is there for steps ahead of their loads"
        assert (void > 0) == (shape.copy_failures > 0)
    if shape.elsewhere:
        assert delivered > 0, "the shape is there to wait for another replica"
    if shape.with_store and shape.prefix_caching and name != "failing copies":
        assert loads > 0, "the shape is there to load"
