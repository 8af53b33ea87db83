"""What a checkpoint's config.json says, in one frozen form. Imports no torch: the engine and the front door read it too.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`). What the code
cannot run is refused here, by name, before any memory is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_store.keys import DTYPE_BYTES
from workers.errors import CheckpointError, UnknownArchitecture, UnsupportedConfig
from workers.models import MODELS

_UNCAPPED_ROPE = ("default", "linear", "llama3", "yarn")
_CAPPED_ROPE = ("dynamic", "longrope")  # a key's bytes depend on the length beyond the original context


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. Names as in transformers' rope_parameters; `layers.rotary` turns them into a table."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Multi-head latent attention. `q_lora_rank` None: queries come from one plain projection."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope_interleave: bool


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed and shared experts of every layer from `first_moe_layer` on."""

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    intermediate_size: int  # of one expert
    num_groups: int
    num_groups_per_token: int
    first_moe_layer: int
    normalise_weights: bool
    scaling_factor: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One checkpoint. Sizes are of the whole model, before tensor parallelism."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of gqa; mla has its own in `mla`
    rms_norm_eps: float
    max_model_len: int  # tokens
    dtype: str  # of the checkpoint
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    quantisation: str = "none"  # or "fp8": blocks of float8_e4m3fn with weight_scale_inv, dequantised on load
    eos_token_ids: tuple[int, ...] = ()  # config.json's; generation_config.json may say more
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    notes: tuple[str, ...] = ()  # limits the user should be told about

    @property
    def codec(self) -> str:
        return "mla" if self.mla else "gqa"

    @property
    def softmax_scale(self) -> float:
        """What query-key products are multiplied by. MLA under a scaled rope adds the square of YaRN's mscale, as transformers does."""
        if self.mla is None:
            return float(self.head_dim**-0.5)
        scale = float((self.mla.nope_dim + self.mla.rope_dim) ** -0.5)
        if self.rope.kind != "default" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    def block_digest_input(self) -> bytes:
        """Canonical JSON of all that decides a block's bytes besides weights, dtype and layout (GroupInfo.model_config)."""
        fields = asdict(self)
        for name in ("max_model_len", "dtype", "eos_token_ids", "notes", "tie_word_embeddings"):
            del fields[name]
        fields["rope_pairs"] = "halves"  # how rotated keys lie in memory
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, section 3.4), as transformers' get_mscale."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads `folder`/config.json. CheckpointError when it is missing or malformed, UnknownArchitecture and UnsupportedConfig when it
    asks for something that is not built."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model is a folder with config.json and safetensors files") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return _Reader(raw, path).model()


def check_tensor_parallel(config: ModelConfig, tensor_parallel_size: int) -> None:
    """UnsupportedConfig naming the size that `tensor_parallel_size` does not divide."""
    tp = tensor_parallel_size
    sizes = {"num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size}
    if config.moe:
        sizes["moe_intermediate_size"] = config.moe.intermediate_size
    for name, size in sizes.items():
        if tp < 1 or size % tp:
            raise UnsupportedConfig(f"tensor parallel size {tp} does not divide {name} {size}; choose a divisor")
    if config.codec == "gqa" and config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise UnsupportedConfig(f"tensor parallel size {tp} neither divides nor is a multiple of num_key_value_heads {config.num_kv_heads}")


class _Reader:
    """One config.json being read."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def model(self) -> ModelConfig:
        architecture = self.architecture()
        is_mla = architecture.startswith("Deepseek")
        num_layers, num_heads = self.integer("num_hidden_layers"), self.integer("num_attention_heads")
        hidden_size = self.integer("hidden_size")
        self.check_supported(num_layers)
        rope, max_model_len, notes = self.rope()
        head_dim = self.integer("head_dim", 128 if architecture.startswith("Qwen3") else hidden_size // num_heads)
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        if not is_mla and num_heads % num_kv_heads:
            raise self.unsupported("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
        return ModelConfig(
            architecture=architecture,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if is_mla else num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            max_model_len=max_model_len,
            dtype=self.dtype(),
            rope=rope,
            attention_bias=bool(self.raw.get("attention_bias", False)),
            mlp_bias=bool(self.raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
            tie_word_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            quantisation=self.quantisation(),
            eos_token_ids=self.eos_token_ids(),
            mla=self.mla() if is_mla else None,
            moe=self.moe(num_layers) if is_mla else None,
            notes=notes,
        )

    def unsupported(self, field: str, reason: str) -> UnsupportedConfig:
        return UnsupportedConfig(f"{self.path}: {field}: {reason}")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise CheckpointError(f"{self.path}: {name} must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {name} must be a number, not {value!r}")
        return float(value)

    def architecture(self) -> str:
        names = self.raw.get("architectures") or []
        for name in names:
            if name in MODELS:
                return str(name)
        raise UnknownArchitecture(f"{self.path}: architectures {names} is not served; known: {', '.join(sorted(MODELS))}")

    def check_supported(self, num_layers: int) -> None:
        activation = self.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.unsupported("hidden_act", f"activation {activation!r} is not built, only silu")
        kinds = set((self.raw.get("layer_types") or [])[:num_layers]) - {"full_attention"}
        if kinds:
            raise self.unsupported("layer_types", f"layers of kind {sorted(kinds)} are not built, only full_attention")
        if self.raw.get("use_sliding_window") and self.raw.get("sliding_window"):
            raise self.unsupported("use_sliding_window", "sliding-window attention is not built")

    def dtype(self) -> str:
        name = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise self.unsupported("dtype", f"{name} is not one of {', '.join(DTYPE_BYTES)}")
        return name

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.raw.get("eos_token_id")
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) for item in ids):
            raise CheckpointError(f"{self.path}: eos_token_id must be an integer or a list of them, not {value!r}")
        return tuple(ids)

    def quantisation(self) -> str:
        settings = self.raw.get("quantization_config")
        if not settings:
            return "none"
        if (
            settings.get("quant_method") == "fp8"
            and settings.get("weight_block_size") == [128, 128]
            and settings.get("fmt", "e4m3") == "e4m3"
        ):
            return "fp8"
        raise self.unsupported("quantization_config", f"{settings} is not built, only fp8 e4m3 with weight blocks of 128 x 128")

    def rope(self) -> tuple[RopeConfig, int, tuple[str, ...]]:
        """The rope, the longest context, and notes for the user. Keys that only some kinds use are read for all of them."""
        max_positions = self.integer("max_position_embeddings", 2048)
        raw = dict(self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {})
        if any(isinstance(value, dict) for value in raw.values()):
            raise self.unsupported("rope_parameters", "rope settings per kind of layer are not built")
        kind = str(raw.get("rope_type") or raw.get("type") or "default")
        if kind not in (*_UNCAPPED_ROPE, *_CAPPED_ROPE):
            raise self.unsupported("rope type", f"{kind!r} is not built, only {', '.join((*_UNCAPPED_ROPE, *_CAPPED_ROPE))}")
        if float(raw.get("partial_rotary_factor") or self.raw.get("partial_rotary_factor") or 1.0) != 1.0:
            raise self.unsupported("partial_rotary_factor", "a rope over a part of the head is not built")
        original = int(self.raw.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or max_positions)
        if kind == "dynamic":
            original = max_positions  # transformers scales only beyond max_position_embeddings
        factor = raw.get("factor")
        if factor is None:
            factor = max_positions / original if kind in ("yarn", "longrope") else 1.0
        rope = RopeConfig(
            kind=kind,
            theta=float(raw.get("rope_theta") or self.raw.get("rope_theta") or 10000.0),
            factor=float(factor),
            original_max_position_embeddings=original,
            attention_factor=raw.get("attention_factor"),
            low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
            high_freq_factor=float(raw.get("high_freq_factor", 1.0)),
            beta_fast=float(raw.get("beta_fast") or 32),
            beta_slow=float(raw.get("beta_slow") or 1),
            mscale=float(raw.get("mscale") or 0.0),
            mscale_all_dim=float(raw.get("mscale_all_dim") or 0.0),
            truncate=bool(raw.get("truncate", True)),
            short_factor=tuple(float(value) for value in raw.get("short_factor") or ()),
        )
        notes: tuple[str, ...] = ()
        if kind in _CAPPED_ROPE and max_positions >= original:
            notes = (f"rope type {kind} is served up to its original context of {original} tokens",)
            max_positions = original
        return rope, max_positions, notes

    def mla(self) -> MlaConfig:
        return MlaConfig(
            q_lora_rank=None if self.raw.get("q_lora_rank") is None else self.integer("q_lora_rank"),
            kv_lora_rank=self.integer("kv_lora_rank"),
            nope_dim=self.integer("qk_nope_head_dim"),
            rope_dim=self.integer("qk_rope_head_dim"),
            v_dim=self.integer("v_head_dim"),
            rope_interleave=bool(self.raw.get("rope_interleave", True)),
        )

    def moe(self, num_layers: int) -> MoeConfig:
        for name, built in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
            if self.raw.get(name, built) != built:
                raise self.unsupported(name, f"{self.raw[name]!r} is not built, only {built!r}")
        moe = MoeConfig(
            num_experts=self.integer("n_routed_experts"),
            num_experts_per_token=self.integer("num_experts_per_tok"),
            num_shared_experts=self.integer("n_shared_experts", minimum=0),
            intermediate_size=self.integer("moe_intermediate_size"),
            num_groups=self.integer("n_group", 1),
            num_groups_per_token=self.integer("topk_group", 1),
            first_moe_layer=min(self.integer("first_k_dense_replace", 0, minimum=0), num_layers),
            normalise_weights=bool(self.raw.get("norm_topk_prob", True)),
            scaling_factor=self.number("routed_scaling_factor", 1.0),
        )
        if moe.num_experts % moe.num_groups or moe.num_experts // moe.num_groups < 2:
            raise self.unsupported("n_group", f"{moe.num_experts} experts do not make {moe.num_groups} equal groups of at least 2")
        reachable = moe.num_groups_per_token * (moe.num_experts // moe.num_groups)
        if moe.num_groups_per_token > moe.num_groups or moe.num_experts_per_token > reachable:
            raise self.unsupported("topk_group", f"{moe.num_groups_per_token} groups do not hold {moe.num_experts_per_token} experts")
        return moe
