"""Model families. One file and one line here per architecture; files are imported when a checkpoint asks for them."""

MODELS: dict[str, str] = {
    "LlamaForCausalLM": "workers.models.llama:Llama",
    "Qwen3ForCausalLM": "workers.models.qwen3:Qwen3",
    "DeepseekV3ForCausalLM": "workers.models.deepseek:Deepseek",
}
