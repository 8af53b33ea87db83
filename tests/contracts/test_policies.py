"""Every routing policy, as the table names them: what the router relies on, whatever a policy prefers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from runtime.errors import DeploymentError
from runtime.routing.policies import POLICIES, make_policy
from runtime.routing.types import Candidate, PolicySettings, RoutingContext


def some_candidates(draw: random.Random) -> list[Candidate]:
    names = draw.sample([f"r{index}" for index in range(20)], draw.randint(1, 8))
    return [Candidate(name, draw.randrange(50), draw.choice([0, 10, 5000, 10**6]), draw.choice([0, 0, 64, 640])) for name in names]


@pytest.mark.parametrize("name", POLICIES)
def test_chooses_one_of_the_candidates_whatever_their_order(name: str) -> None:
    draw = random.Random(7)
    for _ in range(500):
        candidates = some_candidates(draw)
        context = RoutingContext(draw.choice([1, 700, 100_000]))
        chosen = make_policy(name).choose(context, candidates)
        assert chosen in candidates
        assert make_policy(name).choose(context, draw.sample(candidates, len(candidates))) == chosen


@pytest.mark.parametrize("name", POLICIES)
def test_equal_requests_on_replicas_that_count_them_spread_evenly(name: str) -> None:
    """The load that a policy causes comes back to it through the counts."""
    policy = make_policy(name)
    requests: Counter[str] = Counter()
    names = ["r0", "r1", "r2", "r3"]
    for _ in range(400):
        candidates = [Candidate(replica, requests[replica], 100 * requests[replica]) for replica in names]
        requests[policy.choose(RoutingContext(100), candidates).replica_id] += 1
    assert set(requests.values()) == {100}


@pytest.mark.parametrize("name", POLICIES)
def test_states_whether_it_needs_prefixes(name: str) -> None:
    policy = make_policy(name)
    assert isinstance(policy.needs_prefixes, bool)
    if not policy.needs_prefixes:
        plain = [Candidate("r0", 3, 50), Candidate("r1", 1, 20)]
        marked = [candidate._replace(prefix_tokens=index * 100) for index, candidate in enumerate(reversed(plain))]
        assert policy.choose(RoutingContext(200), plain).replica_id
        first, second = make_policy(name), make_policy(name)
        assert first.choose(RoutingContext(200), plain).replica_id == second.choose(RoutingContext(200), marked).replica_id


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(DeploymentError, match="prefix_affinity"):
        make_policy("fastest")


def test_round_robin_takes_turns_while_replicas_come_and_go() -> None:
    policy = make_policy("round_robin")
    replicas = [Candidate(name, 0, 0) for name in ("a", "b", "c")]
    turns = [policy.choose(RoutingContext(1), replicas).replica_id for _ in range(4)]
    turns += [policy.choose(RoutingContext(1), replicas[1:]).replica_id for _ in range(3)]
    assert turns == ["a", "b", "c", "a", "b", "c", "b"]


def test_least_loaded_weighs_requests_and_queued_tokens() -> None:
    policy = make_policy("least_loaded")
    assert policy.choose(RoutingContext(1), [Candidate("a", 100, 0), Candidate("b", 1, 50)]).replica_id == "b"
    assert policy.choose(RoutingContext(1), [Candidate("a", 3, 0), Candidate("b", 0, 100_000)]).replica_id == "a"


def test_affinity_holds_until_the_uncached_tokens_pass_the_limit() -> None:
    policy = make_policy("prefix_affinity", PolicySettings(affinity_limit_tokens=1000))
    context = RoutingContext(600)
    far, idle = Candidate("far", 40, 0, 512), Candidate("idle", 0, 0, 0)
    assert policy.choose(context, [idle, far]) == far
    assert policy.choose(context, [idle, far._replace(queued_tokens=912)]).replica_id == "far"
    assert policy.choose(context, [idle, far._replace(queued_tokens=913)]) == idle
    longer = Candidate("longer", 60, 0, 528)
    assert policy.choose(context, [idle, far, longer]) == longer
    assert policy.choose(context, [idle, far, longer._replace(prefix_tokens=512)]) == far
