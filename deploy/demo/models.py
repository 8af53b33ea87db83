"""The two architectures, and what training adds to transformers' classes without changing what is saved.

Shape suffixes: T tokens of a batch, D hidden width, E experts, K experts chosen per token, I expert width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

MAX_CONTEXT_TOKENS = 8192
# DeepSeek-V3 (technical report, 4.2) moves the biases by 0.001 over hundreds of thousands of steps, and by 0 in the last part. With a
# few thousand steps they must move faster at first, while all tokens still look alike to the router, and settle by the end.
_FIRST_BIAS_STEP = 5e-3
_LAST_BIAS_STEP_AT = 0.95  # share of training


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One architecture: how to configure it, and the learning rate that suits it."""

    name: str
    make_config: Callable[[int, bool], PreTrainedConfig]  # (vocab_size, tiny)
    model_class: type[PreTrainedModel]
    peak_learning_rate: float


def _common(vocab_size: int, hidden_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        # Transformers without Tears (arXiv 1910.05895): small initialisation, sqrt(2 / 5d).
        "initializer_range": round(math.sqrt(2 / (5 * hidden_size)), 4),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def mla_config(vocab_size: int, tiny: bool) -> DeepseekV3Config:
    """Multi-head latent attention and experts. The attention sizes per head are DeepSeek-V3's own: GPU kernels are built for those."""
    heads = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    if tiny:
        heads = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    return DeepseekV3Config(
        **_common(vocab_size, 64 if tiny else 160),
        **heads,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        intermediate_size=96 if tiny else 448,
        moe_intermediate_size=32 if tiny else 64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,  # the two chosen experts together weigh 2, the shared one 1
        num_nextn_predict_layers=0,
    )


def gqa_config(vocab_size: int, tiny: bool) -> Qwen3Config:
    """Grouped-query attention: 8 query heads share 2 key-value heads."""
    return Qwen3Config(
        **_common(vocab_size, 64 if tiny else 192),
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16 if tiny else 64,
        intermediate_size=96 if tiny else 384,
    )


DEMO_MODELS: dict[str, DemoModel] = {
    "mla": DemoModel("mla", mla_config, DeepseekV3ForCausalLM, peak_learning_rate=2e-3),
    "gqa": DemoModel("gqa", gqa_config, Qwen3ForCausalLM, peak_learning_rate=3e-3),
}


def build(demo: DemoModel, vocab_size: int, tiny: bool) -> PreTrainedModel:
    """A freshly initialised float32 model; the projections into the residual stream start smaller by sqrt(2 x layers)."""
    config = demo.make_config(vocab_size, tiny)
    model = demo.model_class(config).float()
    if correction_biases(model):
        model.set_experts_implementation("eager")  # outside of training_extras; grouped kernels do not exist for every device and dtype
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(scale)
    return model


def count_parameters(demo: DemoModel, vocab_size: int, tiny: bool) -> int:
    """Parameters of the configuration, tied ones once, without allocating them."""
    with torch.device("meta"):
        model = demo.model_class(demo.make_config(vocab_size, tiny))
    return sum(parameter.numel() for parameter in model.parameters())


def bias_step(progress: float) -> float:
    """How far one update moves a router bias; progress runs from 0 to 1."""
    return _FIRST_BIAS_STEP * max(0.0, 1 - progress / _LAST_BIAS_STEP_AT)


def correction_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    """The router biases by their full names; empty for a model without experts."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def dense_experts(experts: nn.Module, hidden_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Every expert on every token as two matrix products, then zero weight for those not chosen: [T, D].

    With 8 experts of width 64 this is faster than sorting tokens by expert, needs no synchronisation with the host, and gives the
    same numbers as transformers' loop (the tests compare them).
    """
    num_experts, gate_up_size, hidden_size = experts.gate_up_proj.shape
    weight_TE = weight_TK.new_zeros(len(hidden_TD), num_experts).scatter(1, chosen_TK, weight_TK)
    both = functional.linear(hidden_TD, experts.gate_up_proj.reshape(-1, hidden_size)).view(-1, num_experts, gate_up_size)
    gate_TEI, up_TEI = both.chunk(2, dim=-1)
    active_TEI = experts.act_fn(gate_TEI) * up_TEI * weight_TE.unsqueeze(-1).to(up_TEI.dtype)
    down_DF = experts.down_proj.permute(1, 0, 2).reshape(hidden_size, -1)
    return functional.linear(active_TEI.flatten(1), down_DF).to(hidden_TD.dtype)


class ExpertBalancer:
    """Auxiliary-loss-free balancing (DeepSeek-V3 report, 2.1.2; arXiv 2408.15664).

    Counts the training tokens each expert of each layer gets. After a step the bias of an overloaded expert goes down and that of
    an underloaded one up, both by a fixed amount; the bias only enters the choice of experts, not their weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._gates = {name.removesuffix(".gate"): module for name, module in model.named_modules() if name.endswith("mlp.gate")}
        self._counts: dict[str, Tensor] = {}
        for name, gate in self._gates.items():
            self._counts[name] = torch.zeros_like(gate.e_score_correction_bias, dtype=torch.float32)
        self._handles = [
            model.get_submodule(f"{name}.experts").register_forward_pre_hook(partial(self._count, counts=self._counts[name]))
            for name in self._gates
        ]

    @staticmethod
    def _count(module: nn.Module, inputs: tuple[Tensor, ...], *, counts: Tensor) -> None:
        if module.training:
            chosen = inputs[1].reshape(-1)
            counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))

    @torch.no_grad()
    def update(self, step: float) -> None:
        """Moves each bias by step against the load since the last update, and starts counting anew."""
        for name, gate in self._gates.items():
            counts = self._counts[name]
            gate.e_score_correction_bias.add_(step * torch.sign(counts.mean() - counts))
            counts.zero_()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def expert_load(model: PreTrainedModel, batches: Iterator[Tensor]) -> dict[str, list[float]]:
    """Share of the routed tokens that each expert gets, per MoE layer; 1 / experts is even. Empty for a model without experts."""
    counts: dict[str, Tensor] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], *, name: str) -> None:
        loads = torch.bincount(inputs[1].reshape(-1), minlength=module.num_experts)
        counts[name] = counts[name] + loads if name in counts else loads

    names = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    handles = [model.get_submodule(name).register_forward_pre_hook(partial(count, name=name)) for name in names]
    try:
        for tokens_BL in batches:
            model(input_ids=tokens_BL, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name.removesuffix(".mlp.experts"): (load / load.sum()).tolist() for name, load in counts.items()}


@contextlib.contextmanager
def training_extras(model: PreTrainedModel, dropout: float) -> Iterator[None]:
    """Dropout, dense experts and a float32 router for the time of training; the model is transformers' own again afterwards.

    The corpus is read many times over, and the classes have dropout for attention weights only: here it is on the embeddings and on
    every branch that joins the residual stream. Under autocast the router's product would run in bfloat16, and inference would then
    choose other experts than training did.
    """
    handles = []
    replaced: list[nn.Module] = []

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (functional.dropout(output[0], dropout, module.training), *output[1:])
        return functional.dropout(output, dropout, module.training)

    def in_float32(forward: Callable[..., Any], hidden: Tensor) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    try:
        for name, module in model.named_modules():
            if dropout and name.endswith(("embed_tokens", ".self_attn", ".mlp")):
                handles.append(module.register_forward_hook(drop))
            if name.endswith("mlp.experts"):
                module.forward = partial(dense_experts, module)
                replaced.append(module)
            if name.endswith("mlp.gate"):
                module.forward = partial(in_float32, module.forward)
                replaced.append(module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward  # the class's own method shows again


@contextlib.contextmanager
def compiled_layers(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Compiles each decoder layer, not the model: around them stays the eager code that recognises a plain causal mask and drops it."""
    if not wanted:
        yield
        return
    layers = list(model.get_submodule("model.layers").children())
    # Kinds of layer x sequence lengths x training or evaluation: more variants than dynamo keeps by default.
    with torch._dynamo.config.patch(recompile_limit=64):
        for layer in layers:
            layer.compile(dynamic=False)
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
