"""What a user installs: everything that runs must be in the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runtime", "workers", "cache_store", "protos", "deploy")
MODEL_FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of the sources, and unpacked: as installed, but for the launcher."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "."]
    done = subprocess.run([*command, "--wheel-dir", str(built)], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [wheel] = built.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "site")
    return built / "site"


def run(site: Path, code: str) -> str:
    """Runs in the unpacked wheel, away from the sources."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_data_file_is_in_it(site: Path) -> None:
    for name in PACKAGES:
        sources = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
        assert {path for path in sources if not (site / path).is_file()} == set()
    for name in ("inference", "cache_store"):
        for suffix in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert (site / "protos" / (name + suffix)).is_file()
    for model in ("gqa", "mla"):
        assert [name for name in MODEL_FILES if not (site / "deploy" / "demo" / model / name).is_file()] == []
    assert "mobula = runtime.cli:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()


def test_the_command_runs_from_it(site: Path) -> None:
    told = run(site, "import sys; from runtime.cli import main; sys.argv = ['mobula', '--help']; main()")
    assert "generate" in told
    code = (
        "from runtime.config import EMBEDDED_MODELS; from runtime.text.model_card import load_served_model\n"
        "for name in ('gqa', 'mla'): print(load_served_model(str(EMBEDDED_MODELS / name), '', None).tokenizer is not None, EMBEDDED_MODELS)"
    )
    assert run(site, code) == f"True {site}/deploy/demo\n" * 2
