"""Expert settings of a config.json: DeepSeek-V2 (arXiv 2405.04434, section 2.2) and DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.models.fields import Fields

SOFTMAX_METHODS = ("greedy", "group_limited_greedy")
SIGMOID_METHODS = ("noaux_tc",)


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed and shared experts of every layer from `first_moe_layer` on."""

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    intermediate_size: int  # of one expert
    num_groups: int  # 1: experts are chosen among all
    num_groups_per_token: int
    first_moe_layer: int
    normalise_weights: bool
    scaling_factor: float
    scoring: str = "sigmoid"  # with a correction bias, groups by their best two; or "softmax": without, groups by their best


def read_moe(fields: Fields, routing: str, num_layers: int) -> MoeConfig:
    """`routing`: "softmax" or "sigmoid". Settings whose default differs between the families are required."""
    method = _check_method(fields, routing)
    num_groups = fields.integer("n_group", None if routing == "sigmoid" or method == "group_limited_greedy" else 1)
    num_groups_per_token = fields.integer("topk_group", None if num_groups > 1 else 1)
    if method == "greedy":
        num_groups = num_groups_per_token = 1
    if routing == "softmax" and fields.flag("norm_topk_prob"):
        raise fields.unsupported("norm_topk_prob", "weights of softmax routing are never normalised in the oracle; true is not built")
    moe = MoeConfig(
        num_experts=fields.integer("n_routed_experts"),
        num_experts_per_token=fields.integer("num_experts_per_tok"),
        num_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),
        intermediate_size=fields.integer("moe_intermediate_size"),
        num_groups=num_groups,
        num_groups_per_token=num_groups_per_token,
        first_moe_layer=min(fields.integer("first_k_dense_replace", 0, minimum=0), num_layers),
        normalise_weights=routing == "sigmoid" and fields.flag("norm_topk_prob", True),
        scaling_factor=fields.number("routed_scaling_factor", 1.0),
        scoring=routing,
    )
    _check_groups(fields, moe)
    return moe


def _check_method(fields: Fields, routing: str) -> str:
    methods = SOFTMAX_METHODS if routing == "softmax" else SIGMOID_METHODS
    method = fields.raw.get("topk_method") or methods[0]
    built: dict[str, tuple[object, ...]] = {"scoring_func": (routing,), "topk_method": methods, "moe_layer_freq": (1,)}
    for name, values in built.items():
        if fields.has(name) and fields.raw[name] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise fields.unsupported(name, f"{fields.raw[name]!r} is not built for {routing} routing, only {wanted}")
    return str(method)


def _check_groups(fields: Fields, moe: MoeConfig) -> None:
    smallest = 2 if moe.scoring == "sigmoid" else 1
    if moe.num_experts % moe.num_groups or moe.num_experts // moe.num_groups < smallest:
        raise fields.unsupported("n_group", f"{moe.num_experts} experts do not make {moe.num_groups} equal groups of at least {smallest}")
    reachable = moe.num_groups_per_token * (moe.num_experts // moe.num_groups)
    if moe.num_groups_per_token > moe.num_groups or moe.num_experts_per_token > reachable:
        raise fields.unsupported("topk_group", f"{moe.num_groups_per_token} groups do not hold {moe.num_experts_per_token} experts")
