"""The training of the demo models, at sizes for a CPU: the same path as the real run."""

from __future__ import annotations

import json
import math
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.corpus import BOS, EOS, HELD_OUT_MODULES, Message, load_corpus, render_chat
from deploy.demo.evaluate import evaluate_folder, held_out_loss
from deploy.demo.loop import Trainer
from deploy.demo.models import DEMO_MODELS, ExpertBalancer, build, correction_biases, count_parameters, training_extras
from deploy.demo.packing import EncodedCorpus, PackedStream, windows
from deploy.demo.plot import Mark, Series, draw, ticks, write_png
from deploy.demo.progress import Limits, Stopwatch
from deploy.demo.settings import FULL, MAX_TOTAL_BYTES, TINY, Settings
from deploy.demo.train import main
from deploy.demo.vocabulary import CHAT_TEMPLATE, token_bytes

torch.set_num_threads(1)

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "loss_curve.json",
    "loss_curve.png",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    main(["--tiny", "--out", str(out)])
    return out


@pytest.mark.parametrize("name", sorted(DEMO_MODELS))
def test_a_run_writes_a_checkpoint_that_loads_and_has_learned(trained: Path, name: str) -> None:
    folder = trained / name
    assert {path.name for path in folder.iterdir()} == FILES
    curve = json.loads((folder / "loss_curve.json").read_text())
    assert curve["num_steps"] == TINY.num_steps
    assert curve["held_out"][-1][1] < curve["held_out"][0][1] < math.log(TINY.vocab_size) + 0.5
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(Path(json.__file__).read_text()).ids
    result = evaluate_folder(folder, windows([np.array(ids)], 64, 4), token_bytes(tokenizer), torch.float32, torch.device("cpu"))
    assert result.nats_per_token < math.log(TINY.vocab_size)
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"], config["max_position_embeddings"]) == ("bfloat16", True, 8192)
    end = tokenizer.token_to_id("<|end|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.token_to_id(EOS), end]


def test_router_biases_were_trained_and_are_saved_in_float32(trained: Path) -> None:
    with safe_open(trained / "mla" / "model.safetensors", "pt") as tensors:
        saved = {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith("e_score_correction_bias")}  # noqa: SIM118
        experts = [key for key in tensors.keys() if ".experts.7." in key]  # noqa: SIM118
    assert experts  # in the names of published checkpoints, one tensor for each expert
    model = AutoModelForCausalLM.from_pretrained(trained / "mla", dtype=torch.bfloat16)
    loaded = correction_biases(model)
    assert saved.keys() == loaded.keys()
    for name, bias in saved.items():
        assert bias.dtype == loaded[name].dtype == torch.float32
        assert torch.equal(bias, loaded[name])
        assert bias.abs().max() > 0


def test_the_chat_template_gives_the_format_of_training(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "gqa")
    messages = [
        Message("system", "Be brief."),
        Message("user", "What is `a`?"),
        Message("assistant", "def a():\n    pass"),
        Message("user", "Why?"),
    ]
    asked = [message._asdict() for message in messages]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == render_chat(messages)
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == render_chat(messages) + "<|assistant|>"
    assert (trained / "gqa" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    text = "def f(x):\n\treturn 'é' * x  # \u2026\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == BOS + text
    assert sum(token_bytes(tokenizer.backend_tokenizer)[index] for index in ids) == len(text.encode())


def test_held_out_modules_give_no_training_text() -> None:
    corpus = load_corpus(seed=0)
    held_out = {document.name.removesuffix(".py").split("/")[0] for document in corpus.held_out}
    assert held_out == set(HELD_OUT_MODULES)
    for document in (*corpus.files, *corpus.snippets):
        assert document.name.removesuffix(".py").replace("/", ".").split(".")[0] not in HELD_OUT_MODULES
    rare = "def detect_encoding(b):"  # of json
    assert any(rare in document.text for document in corpus.held_out)
    assert not any(rare in document.text for group in (corpus.files, corpus.topics, corpus.snippets, corpus.chats) for document in group)


def test_sequences_follow_the_documents_and_begin_at_short_ones() -> None:
    def document(first: int, length: int) -> np.ndarray:
        return np.arange(first, first + length)

    files = [document(1000, 300), document(2000, 90)]
    chats = [document(10_000 + 100 * index, 12) for index in range(30)]
    stream = PackedStream(EncodedCorpus(files, [], [], chats, []), chat_share=0.3, snippet_share=0.0, seed=3)
    starts = {int(piece[0]) for piece in (*files, *chats)}
    seen: set[int] = set()
    for _ in range(60):
        sequence = stream.take(1, 64)[0]
        assert len(sequence) == 64
        breaks = [index for index in range(1, 64) if sequence[index] != sequence[index - 1] + 1]
        assert all(int(sequence[index]) in starts for index in breaks)
        if sequence[0] >= 10_000:
            assert int(sequence[0]) in starts  # a chat is never entered in its middle
        seen.update(sequence.tolist())
    assert stream.num_epochs > 1
    assert {int(piece[0]) for piece in files} <= seen
    with pytest.raises(ValueError, match="sequences of 10000"):
        stream.take(1, 10_000)


def test_dense_experts_equal_those_of_transformers() -> None:
    torch.manual_seed(0)
    model = build(DEMO_MODELS["mla"], 300, tiny=True).eval()
    for bias in correction_biases(model).values():
        bias.normal_(std=0.1)
    tokens = torch.randint(0, 300, (2, 40))
    expected = model(input_ids=tokens).logits
    with training_extras(model, dropout=0.5):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        model.train()
        assert not torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-2)
    model.eval()
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_balancing_evens_out_the_load_of_a_collapsed_router() -> None:
    torch.manual_seed(0)
    model = build(DEMO_MODELS["mla"], 300, tiny=True).train()
    gate = model.get_submodule("model.layers.1.mlp.gate")
    chosen: list[torch.Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    with torch.no_grad():
        gate.e_score_correction_bias[0] = 2.0  # every token chooses expert 0
    balancer = ExpertBalancer(model)
    tokens = torch.randint(0, 300, (2, 64))
    with torch.no_grad():
        for index in range(200):
            model(input_ids=tokens, use_cache=False)
            balancer.update(0.03 if index < 120 else 0.002)
    balancer.close()
    handle.remove()
    first, last = (torch.bincount(indices.reshape(-1), minlength=8) / indices.numel() for indices in (chosen[0], chosen[-1]))
    assert first.max() == 0.5
    assert last.max() < 0.2
    assert last.min() > 0.05


def small_trainer(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> Trainer:
    """Learns to count; the held-out text is noise, so that learning more makes it worse there."""
    torch.manual_seed(0)
    model = build(DEMO_MODELS["gqa"], 320, tiny=True)
    stream = PackedStream(EncodedCorpus([np.arange(300)] * 4, [], [], [], []), 0.0, 0.0, seed=0)
    noise = np.random.default_rng(0).integers(0, 320, (4, 64))
    return Trainer(model, stream, noise, [1] * 320, settings, 3e-3, lambda progress, text: None, clock)


def test_training_on_the_clock_ends_with_it_and_its_schedule() -> None:
    seconds = count()  # a clock that moves by 1 each time it is read
    settings = replace(TINY, num_steps=None, minutes=40 / 60, max_epochs=1e9, patience_evals=100, tokens_per_step=256)
    trainer = small_trainer(settings, lambda: float(next(seconds)))
    history = trainer.run()
    assert 40 <= history.training_s <= 45
    assert 20 <= history.num_steps <= 45
    assert history.stopped == "schedule finished"
    assert len(history.held_out) == settings.num_evals
    assert history.held_out[-1].step == history.num_steps
    assert history.training[-1].loss < history.training[0].loss
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert all(rate < 0.1 * 3e-3 for rate in rates)


def test_training_stops_when_the_held_out_loss_rises_and_keeps_the_best_weights() -> None:
    trainer = small_trainer(replace(TINY, num_steps=100, num_evals=20, patience_evals=5, tokens_per_step=256))
    history = trainer.run()
    assert history.num_steps < 100
    assert history.stopped == "no better held-out loss in 5 evaluations"
    assert history.best.loss == min(point.loss for point in history.held_out) < history.held_out[-1].loss
    kept = held_out_loss(trainer.model, trainer.held_out_BL, [1] * 320, autocast=True)
    assert kept.nats_per_token == pytest.approx(history.best.loss, abs=1e-4)


def test_held_out_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary() -> None:
    model = build(DEMO_MODELS["gqa"], 320, tiny=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    tokens = windows([np.arange(300)], 64)
    assert tokens.shape == (4, 64)
    result = held_out_loss(model, tokens, [2] * 320, autocast=False)
    assert result.nats_per_token == pytest.approx(math.log(320))
    assert result.bits_per_byte == pytest.approx(math.log2(320) / 2)
    assert result.num_tokens == 4 * 63


def test_the_shipped_models_fit_their_budget() -> None:
    sizes = [2 * count_parameters(demo, FULL.vocab_size, tiny=False) for demo in DEMO_MODELS.values()]
    assert 0.9 * MAX_TOTAL_BYTES < sum(sizes) < MAX_TOTAL_BYTES - 50_000  # headers included


def test_limits_follow_steps_or_the_first_of_time_and_tokens() -> None:
    assert Limits(10, 60.0, 1e6).progress(5, 1e9, 10**9) == 0.5
    assert Limits(None, 60.0, 1000).progress(7, 30.0, 100) == 0.5
    assert Limits(None, 60.0, 1000).progress(7, 3.0, 900) == 0.9
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    now[0] = 5.0
    with watch.paused():
        now[0] = 25.0
    now[0] = 26.0
    assert watch.elapsed_s() == 6.0
    rates = [FULL.learning_rate(1.0, index / 100) for index in range(101)]
    assert max(rates) == rates[2] == 1.0
    assert rates[0] < 0.05
    assert rates[100] == pytest.approx(FULL.final_rate_share)


def test_the_picture_is_a_png_that_shows_the_lines(tmp_path: Path) -> None:
    points = [(float(index), 4.0 - index / 50) for index in range(100)]
    pixels = draw(
        "a title", "steps", "loss", [Series("training", points), Series("held out", points, True)], [Mark("best", 40)], 4.0, (640, 400)
    )
    path = tmp_path / "plot.png"
    write_png(pixels, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (640, 400)
    position, body = 8, b""
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        data = content[position + 8 : position + 8 + length]
        assert struct.unpack(">I", content[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + data)
        body += data if kind == b"IDAT" else b""
        position += 12 + length
    rows = np.frombuffer(zlib.decompress(body), dtype=np.uint8).reshape(400, 1 + 640 * 3)
    assert not rows[:, 0].any()
    assert np.array_equal(rows[:, 1:].reshape(400, 640, 3), pixels)
    coloured = np.argwhere((pixels.max(axis=2).astype(int) - pixels.min(axis=2)) > 60)
    assert len(coloured) > 500
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(1.25, 2.0, 4) == [1.4, 1.6, 1.8, 2.0]
