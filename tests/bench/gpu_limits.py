"""What a card allows, from its measured rates: the least time for the bytes and multiplications that a workload cannot do without. Pure.

A decode step reads every matrix once and each row's keys and values; a prompt multiplies every matrix with each token. Whichever takes
longer counts. Weights and pages are bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.bench import gpu_workloads as work
from tests.bench.gpu_workloads import Figures
from workers.models.config import ModelConfig

ELEMENT_BYTES = 2
_SPARE_MEMORY = 0.75  # of a card: weights and the pages of the long decode must fit into this in every system
_LONG_STREAMS = (16, 8, 4, 2, 1)


class Card(NamedTuple):
    """Rates as measured on random data."""

    copy_bytes_s: float  # of device memory, read and written bytes together
    matmul_flop_s: float  # dense bfloat16
    host_bytes_s: float  # pinned host memory to the device


class Matrices(NamedTuple):
    """Elements of a model's matrices, by who reads them."""

    layers: int  # by every token: attention, dense and shared MLPs, routers
    head: int  # by every token that samples
    embedding: int  # looked up by row
    expert: int  # one routed expert of one layer; 0 without experts
    num_expert_layers: int
    num_experts: int  # of one layer
    num_chosen: int  # of those, by one token

    @property
    def total(self) -> int:
        return self.layers + self.head + self.embedding + self.expert * self.num_experts * self.num_expert_layers

    def read(self, num_tokens: int) -> float:
        """Elements that a step of `num_tokens` reads, where each token's experts are drawn evenly."""
        if not self.expert:
            return self.layers + self.head
        distinct = self.num_experts * (1 - (1 - self.num_chosen / self.num_experts) ** num_tokens)
        return self.layers + self.head + self.expert * distinct * self.num_expert_layers

    @property
    def per_token(self) -> int:
        """Elements that one token is multiplied with, without the head."""
        return self.layers + self.expert * self.num_chosen * self.num_expert_layers


def matrices_of(config: ModelConfig) -> Matrices:
    hidden, moe = config.hidden_size, config.moe
    num_dense = config.num_layers if moe is None else moe.first_moe_layer
    layers = config.num_layers * _attention(config) + num_dense * 3 * hidden * config.intermediate_size
    expert = num_expert_layers = 0
    if moe is not None:
        num_expert_layers = config.num_layers - num_dense
        expert = 3 * hidden * moe.intermediate_size
        layers += num_expert_layers * (moe.num_shared_experts * expert + hidden * moe.num_experts)
    return Matrices(
        layers=layers,
        head=config.vocab_size * hidden,
        embedding=0 if config.tie_word_embeddings else config.vocab_size * hidden,
        expert=expert,
        num_expert_layers=num_expert_layers,
        num_experts=moe.num_experts if moe else 0,
        num_chosen=moe.num_experts_per_token if moe else 0,
    )


def _attention(config: ModelConfig) -> int:
    """Elements of one layer's projections."""
    hidden, heads, mla = config.hidden_size, config.num_heads, config.mla
    if mla is None:
        return hidden * config.head_dim * 2 * (heads + config.num_kv_heads)
    query = heads * (mla.nope_dim + mla.rope_dim)
    queries = hidden * query if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + query)
    latent = hidden * (mla.kv_lora_rank + mla.rope_dim) + mla.kv_lora_rank * heads * (mla.nope_dim + mla.v_dim)
    return queries + latent + heads * mla.v_dim * hidden


def kv_bytes_per_token(config: ModelConfig) -> int:
    if config.mla is not None:
        return config.num_layers * (config.mla.kv_lora_rank + config.mla.rope_dim) * ELEMENT_BYTES
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * ELEMENT_BYTES


def decode_s(config: ModelConfig, card: Card, num_rows: int, context: int) -> float:
    """One step of `num_rows` rows with `context` tokens before each."""
    matrices = matrices_of(config)
    num_bytes = matrices.read(num_rows) * ELEMENT_BYTES + num_rows * context * kv_bytes_per_token(config)
    flops = 2 * num_rows * (matrices.per_token + matrices.head)
    return max(num_bytes / card.copy_bytes_s, flops / card.matmul_flop_s)


def prefill_s(config: ModelConfig, card: Card, num_new: int, num_cached: int = 0, num_prompts: int = 1) -> float:
    """`num_prompts` prompts of `num_new` tokens each behind `num_cached` that are in pages. Only last tokens are scored."""
    matrices, mla = matrices_of(config), config.mla
    head_dims = mla.nope_dim + mla.rope_dim + mla.v_dim if mla else 2 * config.head_dim  # multiplied per query, key and head
    num_pairs = num_new * num_cached + num_new * (num_new + 1) // 2
    attention = 2 * num_pairs * config.num_heads * head_dims * config.num_layers
    flops = num_prompts * (2 * num_new * matrices.per_token + 2 * matrices.head + attention)
    num_bytes = matrices.read(num_prompts * num_new) * ELEMENT_BYTES + num_prompts * num_cached * kv_bytes_per_token(config)
    return max(num_bytes / card.copy_bytes_s, flops / card.matmul_flop_s)


def limits(config: ModelConfig, card: Card, num_long_streams: int) -> Figures:
    """By the names of the figures that `gpu_workloads` gives; those that no simple count bounds have none."""
    own, system = work.OWN_TOKENS, work.SYSTEM_TOKENS
    seconds = {
        f"decode_32k_b{num_long_streams}_ms": decode_s(config, card, num_long_streams, work.LONG_CONTEXT + work.LONG_TOKENS // 2),
        "shared_8k_ttft_ms": prefill_s(config, card, own, system),
        "cold_8k_ttft_ms": prefill_s(config, card, own + system),
        "stream_1_ttft_p50_ms": prefill_s(config, card, work.STREAM_PROMPT),
        "restore_8k_cold_ttft_ms": prefill_s(config, card, system + work.RESTORE_TAIL),
        "restore_8k_pages_ttft_ms": prefill_s(config, card, work.RESTORE_TAIL, system),
        "offload_without_ms": decode_s(config, card, work.OFFLOAD_STREAMS, work.DECODE_CONTEXT + work.OFFLOAD_TOKENS // 2),
    }
    transfer_s = system * kv_bytes_per_token(config) / card.host_bytes_s
    seconds["restore_8k_store_ttft_ms"] = seconds["restore_8k_pages_ttft_ms"] + transfer_s
    seconds["offload_with_ms"] = seconds["offload_without_ms"]
    for count in work.CONCURRENCIES:
        seconds[f"decode_b{count}_ms"] = decode_s(config, card, count, work.DECODE_CONTEXT + work.DECODE_TOKENS // 2)
        seconds[f"stream_{count}_gap_p50_ms"] = decode_s(config, card, count, work.STREAM_PROMPT + work.STREAM_TOKENS // 2)
    for length in work.PREFILL_LENGTHS:
        seconds[f"prefill_{length}_ttft_ms"] = prefill_s(config, card, length)
    count, length = work.PREFILL_BATCH
    found = {name: value * 1e3 for name, value in seconds.items()}
    return found | {f"prefill_{count}x{length}_tok_s": count * length / prefill_s(config, card, length, num_prompts=count)}


def num_long_streams(config: ModelConfig, memory_bytes: float) -> int:
    """Streams of the long decode whose pages a card of `memory_bytes` holds beside the weights, at most 16."""
    spare_bytes = memory_bytes * _SPARE_MEMORY - matrices_of(config).total * ELEMENT_BYTES
    stream_bytes = (work.LONG_CONTEXT + work.LONG_TOKENS) * kv_bytes_per_token(config)
    return next((count for count in _LONG_STREAMS if count * stream_bytes <= spare_bytes), 1)
