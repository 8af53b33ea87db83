"""From a checkpoint's folder to a model with weights, on one rank."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import torch

from workers.checkpoint import Checkpoint
from workers.config import WorkerConfig
from workers.dummy import dummy_weights
from workers.errors import NotEnoughMemory, UnsupportedConfig
from workers.layers.packed import pack_matrices
from workers.layers.parameter import Placement
from workers.models import MODELS
from workers.models.config import ModelConfig
from workers.models.decoder import DecoderModel
from workers.weights import Progress, check_weights, load_weights


def build_model(
    config: WorkerConfig, model_config: ModelConfig, placement: Placement, max_model_len: int, progress: Progress
) -> DecoderModel:
    """The model with its weights, ready to run.

    UnsupportedConfig for an unknown load format; BadTensor when the files do not hold this model, before any memory is taken;
    NotEnoughMemory when the device is too small.
    """
    if config.load_format == "dummy":
        model = _empty_model(config.model, model_config, placement, max_model_len)
        dummy_weights(model, config.seed, progress)
    elif config.load_format == "safetensors":
        with Checkpoint(config.model) as checkpoint:
            check_weights(outline(model_config, placement), model_config, checkpoint)
            model = _empty_model(config.model, model_config, placement, max_model_len)
            load_weights(model, checkpoint, progress)
    else:
        raise UnsupportedConfig(f"--load-format {config.load_format!r} is unknown; known: safetensors, dummy")
    pack_matrices(model)
    return model.eval()


def outline(config: ModelConfig, placement: Placement) -> DecoderModel:
    """The model without memory: names, shapes and parts of its parameters, on the meta device."""
    return _make(config, replace(placement, device=torch.device("meta")), 1)


def _empty_model(folder: str | Path, config: ModelConfig, placement: Placement, max_model_len: int) -> DecoderModel:
    try:
        return _make(config, placement, max_model_len)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"the weights of {folder} do not fit {placement.device}: {error}") from error


def _make(config: ModelConfig, placement: Placement, max_model_len: int) -> DecoderModel:
    module, _, cls = MODELS[config.architecture].implementation.partition(":")
    model: DecoderModel = getattr(importlib.import_module(module), cls)(config, placement, max_model_len)
    return model
