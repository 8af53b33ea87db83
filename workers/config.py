"""What a rank is told once, before it loads its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Parsed by `runtime.config`, sent to every rank of a group unchanged. What it learns comes back in GroupInfo.

    ValueError for limits that could never serve a request.
    """

    model: str  # folder with config.json
    tensor_parallel_size: int = 1
    dtype: str = "auto"  # "auto": the checkpoint's on CUDA, float32 on the CPU; else float32, bfloat16 or float16
    load_format: str = "safetensors"  # or "dummy": weights are a function of parameter name and seed
    seed: int = 0  # of dummy weights
    device: str = "auto"  # "auto": cuda where there is one; else "cpu" or "cuda"
    attention_backend: str = "auto"  # key of workers.attention.BACKENDS
    block_size: int | None = None  # tokens; None: 16 for GQA, 64 for MLA
    kv_memory_bytes: int | None = None  # per rank; None: 1 GiB on the CPU, what the card has to spare on CUDA
    gpu_memory_utilization: float = 0.9  # of the card, for weights and pages together, where kv_memory_bytes is None
    cuda_graphs: bool = True  # decode steps as captured graphs
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # of one step; None: 8192 on CUDA, 2048 on the CPU
    max_model_len: int | None = None  # None: what the checkpoint says

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
