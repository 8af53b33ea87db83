"""Loading a checkpoint of 1 GiB in four files: resident memory of one of two ranks, and bytes per second against reading the files.

    python -m tests.bench load_bench

Every measurement is a process of its own. The files are read once before, so that the page cache holds them for everybody.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Row = tuple[str, float, str, str, bool]
GIB = 1 << 30
NUM_FILES = 4
ROUNDS = 3
HIDDEN, INTERMEDIATE, VOCAB, LAYERS = 2048, 5632, 8192, 5  # of float32: 1.01 GiB
MEMORY_BUDGET_GIB = 0.65  # of a rank that keeps half


def write_checkpoint(folder: Path) -> int:
    """A Llama of random float32 numbers. Returns its bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in (("q", (HIDDEN, HIDDEN)), ("k", (HIDDEN // 2, HIDDEN)), ("v", (HIDDEN // 2, HIDDEN)), ("o", (HIDDEN, HIDDEN))):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (INTERMEDIATE, HIDDEN)), ("up", (INTERMEDIATE, HIDDEN)), ("down", (HIDDEN, INTERMEDIATE))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    rng, weight_map = np.random.default_rng(0), {}
    for index in range(NUM_FILES):
        names = sorted(shapes)[index::NUM_FILES]
        save_file({name: rng.random(shapes[name], np.float32) for name in names}, folder / f"model-{index}.safetensors")
        weight_map |= dict.fromkeys(names, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM (its highest value since the process began) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def load_rank(folder: str, world_size: int) -> dict[str, float]:
    """Runs in a process of its own: what rank 0 of `world_size` keeps, without its peers."""
    import torch

    from workers.config import WorkerConfig
    from workers.layers.parameter import Placement
    from workers.models.build import build_model
    from workers.models.config import load_model_config
    from workers.parallel import Communicator

    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch allocates by itself on first use
    cpu = torch.device("cpu")
    config = load_model_config(folder)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    began_s = time.perf_counter()
    placement = Placement(Communicator(0, world_size, cpu, None), torch.float32, cpu)
    model = build_model(WorkerConfig(folder, world_size), config, placement, 2048, lambda *_: None)
    load_s = time.perf_counter() - began_s
    assert model is not None  # alive while its memory is looked at
    return {"load_s": load_s, "peak": resident_bytes("VmHWM") - before, "kept": resident_bytes("VmRSS") - before}


def read_files(folder: str) -> dict[str, float]:
    """The floor: the same bytes into memory that is written once."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    began_s = time.perf_counter()
    whole = [path.read_bytes() for path in paths]
    return {"load_s": time.perf_counter() - began_s, "kept": sum(map(len, whole))}


def measured(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.load_bench", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder))
        read_files(folder)
        ranks, wholes, floors = [], [], []
        for _ in range(ROUNDS):
            floors.append(measured("read", folder))
            wholes.append(measured("load", folder, "1"))
            ranks.append(measured("load", folder, "2"))
    peak, kept = (max(rank[name] for rank in ranks) / GIB for name in ("peak", "kept"))
    whole_s, rank_s, floor_s = (statistics.median(each["load_s"] for each in group) for group in (wholes, ranks, floors))
    what = f"load of {size / GIB:.2f} GiB float32"
    return [
        (
            f"{what}, rank of 2 (keeps {kept:.2f}): peak memory over import",
            peak,
            "GiB",
            f"<= {MEMORY_BUDGET_GIB}",
            peak <= MEMORY_BUDGET_GIB,
        ),
        (f"{what}, one rank: peak memory over import", max(each["peak"] for each in wholes) / GIB, "GiB", "printed", True),
        (f"{what}, one rank: time", whole_s, "s", "printed", True),
        (f"{what}, rank of 2: time", rank_s, "s", "printed", True),
        (f"{what}, one rank: against reading the files into memory", whole_s / floor_s, "x", "printed", True),
    ]


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(json.dumps(load_rank(sys.argv[2], int(sys.argv[3]))))
    else:
        print(json.dumps(read_files(sys.argv[2])))
