"""What a checkpoint's config.json says, in one frozen form. Imports no torch: the engine and the front door read it too.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`). What the code
cannot run is refused here, by name, before any memory is taken.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_store.keys import DTYPE_BYTES
from workers.errors import CheckpointError, UnknownArchitecture, UnsupportedConfig
from workers.models import MODELS, Family
from workers.models.experts import MoeConfig, read_moe
from workers.models.fields import Fields
from workers.models.rope import RopeConfig, read_rope, yarn_mscale

__all__ = ["MlaConfig", "ModelConfig", "MoeConfig", "RopeConfig", "check_tensor_parallel", "kv_heads_of_rank", "load_model_config"]

ACTIVATIONS = ("silu", "swish")
FP8_BLOCK = 128  # rows and columns that share a scale
_FULL, _SLIDING = "full_attention", "sliding_attention"  # of layer_types
_DEFAULT_WINDOW = 4096  # transformers' for a config without the key; null means none


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
    window: int | None = None  # tokens that a query sees, its own included, in every layer; None: all
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


def load_model_config(folder: str | Path) -> ModelConfig:
    """Reads `folder`/config.json. CheckpointError when it is missing or malformed, UnknownArchitecture and UnsupportedConfig when it
    asks for something that is not built."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model is a folder with config.json and safetensors files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return _read_model(Fields(raw, path))


def check_tensor_parallel(config: ModelConfig, tensor_parallel_size: int) -> None:
    """UnsupportedConfig unless every rank gets the same number of query heads. Everything else may be cut unevenly."""
    if tensor_parallel_size < 1 or config.num_heads % tensor_parallel_size:
        raise UnsupportedConfig(
            f"tensor parallel size {tensor_parallel_size} does not divide num_attention_heads {config.num_heads}; choose a divisor"
        )


def kv_heads_of_rank(config: ModelConfig, tensor_parallel_size: int, rank: int) -> range:
    """The key-value heads that the rank's query heads attend to. Where a group of queries spans ranks, each of them has its head."""
    num_queries, group = config.num_heads // tensor_parallel_size, config.num_heads // config.num_kv_heads
    return range(rank * num_queries // group, ((rank + 1) * num_queries - 1) // group + 1)


def _read_model(fields: Fields) -> ModelConfig:
    architecture = _architecture(fields)
    family = MODELS[architecture]
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    _check_supported(fields)
    mla = _read_mla(fields, family) if family.codec == "mla" else None
    head_dim = fields.integer("head_dim", family.head_dim or max(1, hidden_size // num_heads))
    rope, max_model_len, notes = read_rope(fields, *((mla.rope_dim, "qk_rope_head_dim") if mla else (head_dim, "head_dim")))
    num_kv_heads = num_heads if mla else fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.unsupported("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    window = _read_window(fields, family, num_layers)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, above=0),
        max_model_len=max_model_len,
        dtype=_dtype(fields),
        rope=rope,
        attention_bias="attention_bias" in family.biases and fields.flag("attention_bias"),
        mlp_bias="mlp_bias" in family.biases and fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        quantisation=_quantisation(fields),
        eos_token_ids=_eos_token_ids(fields),
        window=window if window and window < max_model_len else None,  # a longer one hides nothing
        mla=mla,
        moe=read_moe(fields, family.routing, num_layers) if family.routing else None,
        notes=notes,
    )


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures") or []
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in MODELS:
            return name
    raise UnknownArchitecture(f"{fields.path}: architectures {names} is not served; known: {', '.join(sorted(MODELS))}")


def _check_supported(fields: Fields) -> None:
    activation = fields.raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise fields.unsupported("hidden_act", f"activation {activation!r} is not built, only silu")


def _read_mla(fields: Fields, family: Family) -> MlaConfig:
    return MlaConfig(
        q_lora_rank=fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"),
        rope_interleave=family.routing == "softmax" or fields.flag("rope_interleave", True),  # V2 knows no other way
    )


def _read_window(fields: Fields, family: Family, num_layers: int) -> int | None:
    """The window of all layers. UnsupportedConfig for one that only some layers have."""
    named = _layer_kinds(fields, num_layers)
    window, wanted = None, {_FULL}
    if family.window == "every layer":
        is_null = "sliding_window" in fields.raw and not fields.has("sliding_window")
        window = None if is_null else fields.integer("sliding_window", _DEFAULT_WINDOW)
        wanted = {_SLIDING if window else _FULL}
    elif fields.flag("use_sliding_window") and fields.raw.get("sliding_window", _DEFAULT_WINDOW) is not None:
        if not family.window:
            raise fields.unsupported("use_sliding_window", f"{family.title} has no sliding window")
        window = fields.integer("sliding_window", _DEFAULT_WINDOW)
        first = fields.integer("max_window_layers", 28, minimum=0)
        wanted = named or {_SLIDING if layer >= first else _FULL for layer in range(num_layers)}
    if len(wanted) > 1 or (named and named != wanted):
        raise fields.unsupported("layer_types", f"layers of kind {sorted(named | wanted)} in one model are not built, only all of one kind")
    return window if _SLIDING in wanted else None


def _layer_kinds(fields: Fields, num_layers: int) -> set[str]:
    """What `layer_types` names; empty where there is none."""
    kinds = fields.raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise fields.wrong("layer_types", "a list")
    named = {str(kind) for kind in kinds[:num_layers]}
    if unknown := sorted(named - {_FULL, _SLIDING}):
        raise fields.unsupported("layer_types", f"layers of kind {unknown} are not built")
    return named


def _dtype(fields: Fields) -> str:
    name = str(fields.raw.get("dtype") or fields.raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise fields.unsupported("dtype", f"{name} is not one of {', '.join(DTYPE_BYTES)}")
    return name


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise fields.wrong("eos_token_id", "an integer or a list of them")
    return tuple(ids)


def _quantisation(fields: Fields) -> str:
    settings = fields.nested("quantization_config").raw
    if not settings:
        return "none"
    blocks = settings.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]
    if settings.get("quant_method") == "fp8" and blocks and settings.get("fmt", "e4m3") == "e4m3":
        return "fp8"
    raise fields.unsupported("quantization_config", f"{settings} is not built, only fp8 e4m3 with weight blocks of 128 x 128")
