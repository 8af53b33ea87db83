from pathlib import Path

import pytest

from runtime.config import ServeSettings, parse_size, resolve_settings
from runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("123", 123), ("1KiB", 1 << 10), ("512 MiB", 512 << 20), ("1.5gib", 3 << 29), (64, 64), ("2B", 2)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1GB", "1 GiB extra", "nan"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "mobula.toml"
    file.write_text('model = "m"\nreplicas = 2\ntensor-parallel-size = 4\nkv_memory = "1MiB"\n')
    settings = resolve_settings(
        {"replicas": None, "tensor_parallel_size": 2}, file, {"MOBULA_REPLICAS": "3", "MOBULA_KV_MEMORY": "2MiB", "HOME": "/"}
    )
    assert (settings.model, settings.replicas, settings.tensor_parallel_size, settings.kv_memory) == ("m", 3, 2, 2 << 20)


@pytest.mark.parametrize(
    ("given", "names"), [(["a"], ("a",)), (["a", "b"], ("a", "b")), (["a, b", "c"], ("a", "b", "c")), ([], ("model",)), (None, ("model",))]
)
def test_a_model_may_be_given_several_names(given: list[str] | None, names: tuple[str, ...]) -> None:
    assert resolve_settings({"model": "/some/model", "served_model_name": given}, None, {}).model_names == names


def test_names_and_keys_from_a_file_and_the_environment(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('blue = "blue-key-1"\n')
    file = tmp_path / "mobula.toml"
    file.write_text(f'served-model-name = ["a", "b"]\napi-keys = "{keys}"\n')
    settings = resolve_settings({}, file, {"MOBULA_METRICS_PORT": "0"})
    assert (settings.model_names, settings.metrics_port) == (("a", "b"), 0)
    assert [tenant for tenant, _ in settings.api_keys] == ["blue"]
    assert "blue-key-1" not in repr(settings)
    assert resolve_settings({}, None, {"MOBULA_SERVED_MODEL_NAME": "x,y"}).model_names == ("x", "y")


@pytest.mark.parametrize(
    ("flags", "environment", "text", "named"),
    [
        ({"kv_memory": "much"}, {}, "", "--kv-memory"),
        ({}, {"MOBULA_REPLICAS": "two"}, "", "MOBULA_REPLICAS"),
        ({"replicas": 0}, {}, "", "--replicas"),
        ({"max_num_batched_tokens": 0}, {}, "", "--max-num-batched-tokens"),
        ({}, {"MOBULA_MAX_PROMPT_TOKENS_BESIDE_OUTPUTS": "0"}, "", "--max-prompt-tokens-beside-outputs"),
        ({"load_format": "pickle"}, {}, "", "--load-format"),
        ({"served_model_name": ["a", "a"]}, {}, "", "--served-model-name"),
        ({"served_model_name": [""]}, {}, "", "--served-model-name"),
        ({"api_keys": "/nowhere/keys.toml"}, {}, "", "--api-keys: /nowhere/keys.toml"),
        ({"metrics_port": 70_000}, {}, "", "--metrics-port"),
        ({"store_metrics_port": 0}, {}, "", "--store-metrics-port"),
        ({"deployment": "A b"}, {}, "", "--deployment"),
        ({}, {}, "no_such = 1", "no_such"),
        ({}, {}, "= broken", "--config"),
    ],
)
def test_a_bad_value_names_its_source(flags: dict[str, object], environment: dict[str, str], text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "mobula.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=named):
        resolve_settings(flags, file, environment)


def test_the_worker_config_takes_over_what_ranks_need() -> None:
    worker = ServeSettings(model="/m", tensor_parallel_size=4, kv_memory=5, load_format="dummy", max_model_len=77).worker_config()
    assert (worker.model, worker.tensor_parallel_size, worker.kv_memory_bytes, worker.load_format, worker.max_model_len) == (
        "/m",
        4,
        5,
        "dummy",
        77,
    )
