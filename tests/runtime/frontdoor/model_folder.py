"""A checkpoint's folder without weights: config.json and a byte-level tokenizer so small that an emoji takes several tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

MAX_MODEL_LEN = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('no such thing') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}


def train_tokenizer() -> Tokenizer:
    """<s>, </s>, <|im_start|>, <|im_end|> are 0 to 3; then 256 bytes; then merges of plain English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then the other one too"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_model(folder: Path, *, tokenizer: bool = True, chat: bool = True, generation: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    trained = train_tokenizer()
    vocab_size = trained.get_vocab_size()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab_size}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        trained.save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(named | ({"chat_template": CHAT_TEMPLATE} if chat else {})))
    return folder
