"""`mobula models`: the families that can be served, from the table that loads them, and what of a checkpoint's settings is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from cache_store.keys import DTYPE_BYTES
from runtime.config import ServeSettings
from workers.checkpoint import DTYPES
from workers.models import MODELS, Family
from workers.models.config import ACTIVATIONS, FP8_BLOCK, check_tensor_parallel, load_model_config
from workers.models.experts import SIGMOID_METHODS, SOFTMAX_METHODS
from workers.models.rope import CAPPED_ROPES, UNCAPPED_ROPES

_WINDOWS = {"": "", "every layer": "sliding_window", "by setting": "use_sliding_window in all layers"}
_ROUTING = {
    "": "",
    "softmax": f"softmax routing ({', '.join(SOFTMAX_METHODS)})",
    "sigmoid": f"sigmoid routing ({', '.join(SIGMOID_METHODS)})",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One setting of checkpoints: what is served, and what is refused by name before any memory is taken."""

    setting: str
    served: str
    refused: str


def models(*, as_json: bool, console: Console) -> None:
    if as_json:
        print(
            json.dumps(
                {"families": [_fields(name, family) for name, family in MODELS.items()], "limits": [asdict(each) for each in limits()]}
            )
        )
        return
    console.print(_family_table())
    console.print(_limit_table())


def announce_model(settings: ServeSettings, console: Console) -> None:
    """Before anything is started: a CheckpointError for a folder or a tensor parallel size that cannot be served, and the model's limits
    for the user to read."""
    config = load_model_config(settings.model)
    check_tensor_parallel(config, settings.tensor_parallel_size)
    for note in config.notes:
        console.print(note, highlight=False)


def limits() -> list[Limit]:
    return [
        Limit("architectures", ", ".join(MODELS), "any other"),
        Limit("hidden_act", ", ".join(ACTIVATIONS), "any other"),
        Limit("rope type", ", ".join(UNCAPPED_ROPES), "any other; a rope over a part of the head; ropes per kind of layer"),
        Limit("rope type, capped", f"{', '.join(CAPPED_ROPES)}, up to the original context", "a longer context"),
        Limit("layer_types", "all layers alike", "full and sliding attention in one model"),
        Limit("tensors", f"safetensors of {', '.join(DTYPES)}", "other dtypes; files or an index that are not sound; other formats"),
        Limit("quantization_config", f"fp8 e4m3 in blocks of {FP8_BLOCK} x {FP8_BLOCK}, dequantised on load", "any other"),
        Limit("dtype", ", ".join(DTYPE_BYTES), "any other"),
        Limit("tensor parallel size", "any that divides num_attention_heads", "one that does not"),
    ]


def _fields(architecture: str, family: Family) -> dict[str, object]:
    return {
        "architecture": architecture,
        "models": family.title,
        "attention": family.codec,
        "experts": _ROUTING[family.routing],
        "sliding_window": _WINDOWS[family.window],  # the setting that turns one on; empty: none does
        "bias_settings": list(family.biases),
    }


def _family_table() -> Table:
    table = Table(title="families")
    for column in ("architecture", "models", "attention", "settings that count"):
        table.add_column(column, no_wrap=column == "architecture", overflow="fold")
    for architecture, family in MODELS.items():
        settings = (_ROUTING[family.routing], _WINDOWS[family.window], *family.biases)
        table.add_row(architecture, family.title, family.codec, ", ".join(setting for setting in settings if setting))
    return table


def _limit_table() -> Table:
    table = Table(title="settings")
    for column in ("setting", "served", "refused"):
        table.add_column(column)
    for each in limits():
        table.add_row(each.setting, each.served, each.refused)
    return table
