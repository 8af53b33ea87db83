"""What a front door tells its operators: the Prometheus endpoint, one log line per request, `mobula status`."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from protos import inference_pb2 as pb
from runtime.commands import status as status_command
from runtime.engine.frames import Load, RequestOutput
from runtime.errors import DeploymentError
from runtime.frontdoor.server import FrontDoor, FrontDoorConfig
from tests.runtime.frontdoor.conftest import Setup, ids_request, status_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually, tokens_plan
from tests.runtime.frontdoor.real_engine import RealEngine

# vLLM's names with its prefix replaced; a dashboard made for one reads the other.
VLLM_NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
}


async def scrape(address: str) -> dict[str, Any]:
    """Families by name without the prefix."""
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode())
    return {family.name.removeprefix("mobula:"): family for family in text_string_to_metric_families(text)}


def value(family: Any, **labels: str) -> float:
    (sample,) = [sample for sample in family.samples if sample.labels == labels and not sample.name.endswith("_created")]
    return float(sample.value)


async def test_the_endpoint_speaks_of_requests_and_replicas(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine(plan=tokens_plan([40], cached=(16, 32, 0, 0)))
    engine.load = Load(2, 3, 500)
    async with run_engines(engine, metrics_port=0) as setup:
        await setup.generate(ids_request(list(range(10, 80)), max_tokens=5, ignore_eos=True))
        await status_of(setup.stub.Generate(ids_request([]), timeout=5))
        status = await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        families = await scrape(status.front_door.metrics_address)
        assert {name: families[name].type for name in VLLM_NAMES} == VLLM_NAMES
        assert value(families["num_requests_running"], replica="r0") == 2
        assert value(families["num_requests_waiting"], replica="r0") == 3
        assert value(families["kv_cache_usage_perc"], replica="r0") == 0.4
        assert value(families["num_preemptions"], replica="r0") == 7
        assert (value(families["prefix_cache_queries"]), value(families["prefix_cache_hits"])) == (70, 48)
        assert value(families["prompt_tokens_cached"], tier="dram") == 32
        assert value(families["prompt_tokens_not_reused"], reason="cold") == 22
        assert value(families["request_success"], finished_reason="length") == 1
        assert value(families["rpc_failures"], method="Generate", reason="bad_request") == 1
        assert value(families["requests"], status="bad_request") == 1
        assert value(families["num_requests_live"]) == 0
        sums = {sample.name: sample.value for name in VLLM_NAMES for sample in families[name].samples if sample.name.endswith("_sum")}
        assert (sums["mobula:request_queue_time_seconds_sum"], sums["mobula:request_generation_tokens_sum"]) == (0.25, 5)
        await engine.stop()
        await eventually(lambda: not setup.door.router.replica_figures())
        assert not (await scrape(status.front_door.metrics_address))["num_requests_running"].samples
    with pytest.raises(urllib.error.URLError):
        await scrape(status.front_door.metrics_address)


async def test_without_a_port_there_is_no_endpoint(one: Setup) -> None:
    assert (await one.stub.GetStatus(pb.GetStatusRequest(), timeout=5)).front_door.metrics_address == ""


async def test_a_metrics_port_in_use_is_named(run_engines: Callable[..., Any], folder: Path) -> None:
    async with run_engines(FakeEngine(), metrics_port=0) as setup:
        status = await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        port = int(status.front_door.metrics_address.rpartition(":")[2])
        door = FrontDoor(FrontDoorConfig(str(folder), metrics_port=port))
        with pytest.raises(DeploymentError, match="--metrics-port"):
            await door.start()
        await door.stop(0)


async def test_a_real_engines_gauges_follow_its_work(run_engines: Callable[..., Any]) -> None:
    engine = RealEngine(step_s=0.01)
    async with run_engines(engine, metrics_port=0) as setup:
        call = aiter(setup.stub.Generate(ids_request(list(range(100, 140)), max_tokens=100, ignore_eos=True), timeout=20))
        for _ in range(3):
            await anext(call)
        status = await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        families = await scrape(status.front_door.metrics_address)
        assert value(families["num_requests_running"], replica="r0") == 1
        assert 10 / 119 <= value(families["kv_cache_usage_perc"], replica="r0") <= 35 / 119
        assert value(families["engine_steps"], replica="r0") > 0
        async for _ in call:
            pass


async def lines_of(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    def records() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "mobula.request"]

    await eventually(lambda: len(records()) >= count)
    return [json.loads(line) for line in records()]


async def test_every_request_is_one_line_of_json(one: Setup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobula.request")
    engine = one.engines[0]
    engine.plan = tokens_plan([40], cached=(16, 0, 0, 32))
    request = ids_request(list(range(10, 80)), max_tokens=5, ignore_eos=True)
    request.request_id = "fine"
    await one.generate(request)
    await status_of(one.stub.Generate(ids_request([100_000]), timeout=5))
    await status_of(one.stub.Generate(pb.GenerateRequest(request_id="x" * 10_000, text="x"), timeout=5))
    engine.plan = lambda submit: [RequestOutput(submit.request_id, [], error=["Overloaded", "full"])]
    await status_of(one.stub.Generate(ids_request([5], max_tokens=1), timeout=5))
    engine.plan, engine.step_s = tokens_plan([40]), 0.005
    call = one.stub.Generate(ids_request([5], max_tokens=400, ignore_eos=True))
    unread = aiter(call)
    await anext(unread)
    await anext(unread)
    call.cancel()
    lines = await lines_of(caplog, 5)
    assert [line["status"] for line in lines] == ["length", "bad_request", "bad_request", "overloaded", "cancelled"]
    first = lines[0]
    assert 0 < first.pop("ttft_s") <= first.pop("total_s") < 10
    assert first == {
        "request_id": "fine",
        "tenant": "",
        "status": "length",
        "replica": "r0",
        "prompt_tokens": 70,
        "cached_tokens_by_tier": {"pages": 16, "dram": 0, "disk": 0, "peer": 32},
        "completion_tokens": 5,
    }
    assert (lines[1]["ttft_s"], lines[1]["replica"], len(lines[1]["request_id"])) == (None, "", 32)
    assert len(lines[2]["request_id"]) == 256
    assert lines[4]["completion_tokens"] >= 1


async def test_status_is_shown_once_as_json_and_again_and_again(one: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    await asyncio.to_thread(status_command.print_json, one.address, "")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["replicas"][0]["replica_id"], printed["replicas"][0]["used_pages"]) == ("r0", 40)
    assert printed["front_door"] == {"live_requests": 0, "reserved_requests": 0, "reserved_tokens": 0, "metrics_address": ""}
    shown = Console(file=io.StringIO(), width=200, force_terminal=True)
    await asyncio.to_thread(status_command.show, one.address, "", shown)
    rounds: list[float] = []

    def wait(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    live = Console(file=io.StringIO(), width=200, force_terminal=True)
    await asyncio.to_thread(lambda: status_command.watch(one.address, "", live, every_s=0.25, wait=wait))
    assert rounds == [0.25] * 3
    assert isinstance(live.file, io.StringIO)
    assert isinstance(shown.file, io.StringIO)
    assert live.file.getvalue().count("pages used") >= 3
    for text in (live.file.getvalue(), shown.file.getvalue()):
        assert "r0" in text
        assert "0 requests live" in text


async def test_watching_a_front_door_that_is_gone_says_so() -> None:
    live = Console(file=io.StringIO(), width=200, force_terminal=True)

    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    await asyncio.to_thread(lambda: status_command.watch("127.0.0.1:1", "", live, every_s=0.1, wait=wait))
    assert isinstance(live.file, io.StringIO)
    assert "UNAVAILABLE" in live.file.getvalue()
