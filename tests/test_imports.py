"""What may import what, beyond the arrows that import-linter holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# On the path of a step or a token: an actor call costs milliseconds there.
HOT_PATHS = ("runtime/engine", "runtime/frontdoor", "runtime/routing", "runtime/text", "workers", "cache_store")


def imported_by(module: str) -> set[str]:
    script = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["runtime.engine.scheduler", "workers.step", "cache_store.keys"])
def test_pure_modules_load_without_torch_ray_and_grpc(module: str) -> None:
    assert not imported_by(module) & {"torch", "ray", "grpc"}


@pytest.mark.parametrize("module", ["runtime.engine.engine", "runtime.engine.server", "runtime.frontdoor.server", "cache_store.server"])
def test_processes_without_a_model_load_without_torch_and_ray(module: str) -> None:
    assert not imported_by(module) & {"torch", "ray"}


def test_no_actor_calls_on_the_path_of_a_step_or_a_token() -> None:
    files = [path for folder in HOT_PATHS for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [str(path) for path in files if ".remote(" in path.read_text(encoding="utf-8")] == []
