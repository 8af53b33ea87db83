"""Trains the demo models: `python -m deploy.demo.train --out DIR [--only mla|gqa] [--minutes 5] [--seed 0] [--tiny]`.

Each model becomes a folder DIR/<name> that transformers and Mobula load unchanged: config.json, generation_config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja, README.md, loss_curve.png, loss_curve.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from deploy.demo.card import Outcome, write_card, write_loss_curve
from deploy.demo.corpus import BOS, END, EOS, Corpus, Message, load_corpus, render_chat
from deploy.demo.evaluate import evaluate_folder, load_model, token_batches
from deploy.demo.loop import History, Trainer
from deploy.demo.models import DEMO_MODELS, MAX_CONTEXT_TOKENS, DemoModel, build, correction_biases, count_parameters, expert_load
from deploy.demo.packing import EncodedCorpus, PackedStream, count_tokens, encode_corpus, windows
from deploy.demo.progress import reporter
from deploy.demo.settings import FULL, MAX_TOTAL_BYTES, TINY, Settings
from deploy.demo.vocabulary import save_tokenizer, token_bytes, train_tokenizer

SAMPLE_PROMPT = "def read_json(path):"
SAMPLE_QUESTION = "Write a function named read_json: Read a JSON file and return its content."


class Text(NamedTuple):
    """What both models share."""

    corpus: Corpus
    tokenizer: Tokenizer
    encoded: EncodedCorpus


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Path, list[DemoModel], Settings]:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.train", description="Trains the two demo models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models' folders")
    parser.add_argument("--only", choices=sorted(DEMO_MODELS), help="train one of them")
    parser.add_argument("--minutes", type=float, default=FULL.minutes, help="of training per model (default %(default)s)")
    parser.add_argument("--steps", type=int, help="train for exactly so many steps instead: repeatable, where the clock is not")
    parser.add_argument("--max-epochs", type=float, default=FULL.max_epochs, help="passes over the corpus at most (default %(default)s)")
    parser.add_argument("--dropout", type=float, default=FULL.dropout, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, help="peak; default: the model's own")
    parser.add_argument("--tokens-per-step", type=int, help=f"default {FULL.tokens_per_step}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU: small sizes, a few steps, the same path")
    args = parser.parse_args(arguments)
    base = TINY if args.tiny else FULL
    settings = replace(
        base,
        seed=args.seed,
        minutes=args.minutes,
        num_steps=args.steps or base.num_steps,
        max_epochs=args.max_epochs,
        dropout=args.dropout,
        peak_learning_rate=args.learning_rate or base.peak_learning_rate,
        tokens_per_step=args.tokens_per_step or base.tokens_per_step,
        compile=args.compile,
    )
    return args.out, [DEMO_MODELS[name] for name in DEMO_MODELS if args.only in (None, name)], settings


def check_budget(settings: Settings) -> None:
    """Both models' weights, whichever is trained now. Raises ValueError when they are too large to ship."""
    sizes = {name: 2 * count_parameters(demo, settings.vocab_size, settings.tiny) for name, demo in DEMO_MODELS.items()}
    print("bfloat16 weights: " + ", ".join(f"{name} {size / 1e6:.2f} MB ({size // 2:,} parameters)" for name, size in sizes.items()))
    if sum(sizes.values()) > MAX_TOTAL_BYTES:
        raise ValueError(f"the models take {sum(sizes.values()):,} bytes together, {MAX_TOTAL_BYTES:,} are allowed: make them smaller")


def prepare_text(settings: Settings) -> Text:
    corpus = load_corpus(settings.seed, settings.max_files)
    tokenizer = train_tokenizer(corpus.tokenizer_texts(), settings.vocab_size)
    encoded = encode_corpus(tokenizer, corpus)
    for line, documents in zip(corpus.summary(), encoded, strict=True):
        print(f"{line}, {count_tokens(documents):,} tokens")
    return Text(corpus, tokenizer, encoded)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """bfloat16 weights; router biases stay float32, as transformers keeps them: bfloat16 would round away many small updates."""
    biases = {name: bias.clone() for name, bias in correction_biases(model).items()}
    model.to(torch.bfloat16)
    for name, bias in correction_biases(model).items():
        bias.data = biases[name]
    end, eos = tokenizer.token_to_id(END), tokenizer.token_to_id(EOS)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=[eos, end], pad_token_id=eos, do_sample=True, temperature=0.6, top_p=0.95
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner alone, also inside a package
    save_tokenizer(tokenizer, folder, MAX_CONTEXT_TOKENS)


def check_saved_biases(model: PreTrainedModel, folder: Path) -> None:
    """Raises ValueError unless the reloaded router biases are bit for bit those that were trained."""
    reloaded = correction_biases(load_model(folder, torch.bfloat16, torch.device("cpu")))
    for name, bias in correction_biases(model).items():
        if reloaded[name].dtype != bias.dtype or not torch.equal(reloaded[name], bias.cpu()):
            raise ValueError(f"{folder}: {name} was saved as {bias.tolist()} and read as {reloaded[name].tolist()}")


@torch.no_grad()
def sample(folder: Path, num_tokens: int, device: torch.device) -> list[tuple[str, str]]:
    """Greedy completions of the saved model: (prompt, completion) for source text and for a chat."""
    model = load_model(folder, torch.bfloat16, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": SAMPLE_QUESTION}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if not chat.startswith(render_chat([Message("user", SAMPLE_QUESTION)])):
        raise ValueError(f"the chat template gives {chat!r}, which is not the format of the training text")
    completions = []
    for prompt, is_chat in ((SAMPLE_PROMPT, False), (chat, True)):
        input_ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_chat).input_ids.to(device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
        completions.append((prompt, tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=False)))
    return completions


def train_one(demo: DemoModel, text: Text, settings: Settings, out: Path, device: torch.device) -> Outcome:
    """Trains, saves and measures one model; everything about it lies in out/<name> afterwards."""
    torch.manual_seed(settings.seed)
    model = build(demo, settings.vocab_size, settings.tiny).to(device)
    peak = settings.peak_learning_rate or demo.peak_learning_rate
    stream = PackedStream(text.encoded, settings.chat_share, settings.snippet_share, settings.seed)
    bytes_of_token = token_bytes(text.tokenizer)
    held_out_BL = windows(text.encoded.held_out, settings.eval_length, settings.max_eval_windows)
    with reporter(demo.name) as report:
        history: History = Trainer(model, stream, held_out_BL, bytes_of_token, settings, peak, report).run()
    folder = out / demo.name
    save_model(model, text.tokenizer, folder)
    check_saved_biases(model, folder)
    loads = expert_load(model.eval(), token_batches(held_out_BL, settings.vocab_size, device))
    long_BL = windows(text.encoded.held_out, settings.long_length, settings.max_eval_windows)
    outcome = Outcome(
        name=demo.name,
        num_parameters=count_parameters(demo, settings.vocab_size, settings.tiny),
        weights_bytes=(folder / "model.safetensors").stat().st_size,
        history=history,
        peak_learning_rate=peak,
        bfloat16=evaluate_folder(folder, held_out_BL, bytes_of_token, torch.bfloat16, device),
        float32=evaluate_folder(folder, held_out_BL, bytes_of_token, torch.float32, device),
        long_windows=evaluate_folder(folder, long_BL, bytes_of_token, torch.bfloat16, device),
        loads=loads,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        corpus_lines=text.corpus.summary(),
        samples=sample(folder, settings.num_sample_tokens, device),
    )
    write_loss_curve(outcome, settings, folder)
    write_card(outcome, settings, folder)
    return outcome


def print_outcome(outcome: Outcome) -> None:
    history = outcome.history
    print(
        f"{outcome.name}: {outcome.num_parameters:,} parameters, {outcome.weights_bytes / 1e6:.2f} MB; {history.num_steps} steps, "
        f"{history.num_epochs:.1f} epochs in {history.training_s:.0f} s, "
        f"{history.tokens_per_second:,.0f} tok/s; {history.stopped}; best at step {history.best.step}"
    )
    for label, quality in (("bf16", outcome.bfloat16), ("fp32", outcome.float32), ("bf16", outcome.long_windows)):
        figures = f"perplexity {quality.perplexity:.3f}, {quality.bits_per_byte:.4f} bits/byte"
        print(f"  held out, {label}, windows of {quality.window_tokens}: {figures}")
    for layer, shares in outcome.loads.items():
        print(f"  expert load {layer}: {' '.join(f'{share:.3f}' for share in shares)}")


def main(arguments: Sequence[str] | None = None) -> None:
    out, demos, settings = parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_budget(settings)
    text = prepare_text(settings)
    outcomes = []
    for demo in demos:
        outcomes.append(train_one(demo, text, settings, out, device))
        print_outcome(outcomes[-1])
    total_bytes = sum(
        (out / name / "model.safetensors").stat().st_size for name in DEMO_MODELS if (out / name / "model.safetensors").exists()
    )
    if total_bytes > MAX_TOTAL_BYTES:
        raise ValueError(f"the weights under {out} take {total_bytes:,} bytes, {MAX_TOTAL_BYTES:,} are allowed")
    for outcome in outcomes:
        for prompt, completion in outcome.samples:
            print(f"\n--- {outcome.name} ---\n{prompt}{completion}")


if __name__ == "__main__":
    main()
