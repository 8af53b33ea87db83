"""Reading checkpoints: shards, known extras, float8 blocks, and one error that names everything wrong."""

import json
import shutil

import pytest
import torch
from checkpoints import CONFIGS, make_model
from model_driver import build_rank, gather_tensors, make_runner
from safetensors.torch import load_file, save_file

from workers.checkpoint import Checkpoint
from workers.digest import dummy_digest, weights_digest
from workers.errors import BadTensor
from workers.layers.parameter import Placement
from workers.models.config import load_model_config
from workers.models.deepseek import Deepseek
from workers.models.llama import Llama
from workers.parallel import Communicator
from workers.weights import check_weights, load_weights, wanted_parts

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CPU = torch.device("cpu")


def loaded(folder, family=Llama, dtype=torch.float32, rank=0, world_size=1, progress=lambda phase, done, total: None):
    config = load_model_config(folder)
    model = family(config, Placement(Communicator(rank, world_size, CPU, None), dtype, CPU), 32)
    with Checkpoint(folder) as checkpoint:
        check_weights(model, config, checkpoint)
        load_weights(model, checkpoint, progress)
    return {name: parameter.data[part.target] for name, part, parameter in wanted_parts(model)}


@pytest.fixture
def rewrite(checkpoints, tmp_path):
    """A copy of a checkpoint whose tensors went through a function."""

    def make(name, change):
        folder = tmp_path / "changed"
        shutil.copytree(checkpoints.folder(name), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_sharded_files_with_an_index(checkpoints, tmp_path):
    tensors = load_file(checkpoints.folder("llama") / "model.safetensors")
    shutil.copy(checkpoints.folder("llama") / "config.json", tmp_path)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, value in loaded(tmp_path).items():
        assert torch.equal(value, tensors[name])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(BadTensor, match=r"b\.safetensors does not exist"):
        loaded(tmp_path)


def test_progress_ends_at_the_total(checkpoints):
    seen = []
    values = loaded(checkpoints.folder("llama"), progress=lambda *args: seen.append(args))
    total = sum(value.nbytes for value in values.values())
    assert seen[0] == ("weights", 0, total)
    assert seen[-1] == ("weights", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_everything_wrong_is_named_at_once(rewrite):
    def damage(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(63)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)

    with pytest.raises(BadTensor) as caught:
        loaded(rewrite("llama", damage))
    message = str(caught.value)
    assert "model.layers.1.self_attn.k_proj.weight is missing" in message
    assert "model.norm.weight has shape [63] where [64] is expected" in message
    assert "model.layers.0.self_attn.q_proj.bias is not part of LlamaForCausalLM" in message


def test_known_extras_are_tolerated(rewrite):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.2.embed_tokens.weight"] = torch.ones(131, 64)
        tensors["model.layers.2.shared_head.norm.weight"] = torch.ones(64)

    assert loaded(rewrite("deepseek", add), Deepseek)


def test_a_tied_head_may_be_stored_too(rewrite):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert "lm_head.weight" not in loaded(rewrite("llama-tied-bias", add))


def test_files_that_cannot_be_read_are_named(checkpoints, tmp_path):
    shutil.copy(checkpoints.folder("llama") / "config.json", tmp_path)
    with pytest.raises(BadTensor, match=r"model\.safetensors does not exist"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BadTensor, match="cannot be read"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadTensor, match="not an index"):
        loaded(tmp_path)


def test_values_are_converted_to_the_compute_dtype(rewrite, checkpoints):
    def halve(tensors):
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    for name, value in loaded(rewrite("llama", halve), dtype=torch.float16).items():
        assert value.dtype == torch.float16
        stored = load_file(checkpoints.folder("llama") / "model.safetensors")[name]
        assert torch.equal(value, stored.bfloat16().to(torch.float16))


@pytest.mark.parametrize("world_size", [1, 4])
def test_float8_blocks_are_scaled(rewrite, world_size):
    """A matrix of two blocks with different scales, in slices that do not end at a block."""
    name = "model.layers.0.self_attn.q_b_proj.weight"  # [192, 24]
    expected = {}

    def quantise(tensors):
        scales = torch.tensor([[0.5], [3.0]])
        spread = scales.repeat_interleave(128, 0)[:192]
        tensors[name] = (tensors[name] / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        expected[name] = tensors[name].float() * spread

    folder = rewrite("deepseek", quantise)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model_config(folder).quantisation == "fp8"
    slices = [loaded(folder, Deepseek, rank=rank, world_size=world_size)[name] for rank in range(world_size)]
    assert torch.equal(torch.cat(slices), expected[name])


@pytest.fixture(scope="module")
def float8(tmp_path_factory):
    """A DeepSeek-V3 checkpoint as it is published, with sizes that are no multiples of a block; and its values."""
    sizes = {"hidden_size": 136, "intermediate_size": 300, "moe_intermediate_size": 132, "kv_lora_rank": 130, "q_lora_rank": 24}
    folder = tmp_path_factory.mktemp("float8")
    make_model(CONFIGS["deepseek"][0], {**CONFIGS["deepseek"][1], **sizes}).save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        expected[name] = value
        if value.dim() == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
            blocks = [-(-size // 128) for size in value.shape]
            scales = torch.rand(blocks) + 0.5
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
            tensors[name], tensors[f"{name}_scale_inv"] = (value / spread).to(torch.float8_e4m3fn), scales
            expected[name] = tensors[name].float() * spread
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, expected


@pytest.mark.parametrize(("world_size", "chunk_bytes"), [(1, 3000), (4, 3000), (8, 4 << 20)])
def test_float8_of_sizes_that_are_no_multiple_of_a_block(float8, world_size, chunk_bytes, monkeypatch):
    """By row and by column, in chunks that begin and end inside blocks."""
    monkeypatch.setattr("workers.weights.CHUNK_BYTES", chunk_bytes)
    folder, expected = float8
    models = [build_rank(folder, rank, world_size) for rank in range(world_size)]
    with Checkpoint(folder) as checkpoint:
        for model in models:
            check_weights(model, load_model_config(folder), checkpoint)
            load_weights(model, checkpoint, lambda phase, done, total: None)
    gathered = gather_tensors(models)
    assert gathered.keys() == expected.keys()
    for name, value in gathered.items():
        assert torch.equal(value, expected[name]), name


def test_float8_without_its_scales_or_its_setting_is_named(float8, tmp_path):
    folder, _ = float8
    tensors = load_file(folder / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    del tensors[f"{gate}_scale_inv"]
    tensors[f"{up}_scale_inv"] = torch.ones(3, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(BadTensor) as caught:
        loaded(tmp_path, Deepseek)
    assert f"{gate}_scale_inv is missing" in str(caught.value)
    assert f"{up}_scale_inv is F32 [3, 1] where F32 [3, 2] is expected" in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadTensor, match="dtype F8_E4M3, which cannot be loaded"):
        loaded(tmp_path, Deepseek)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8])
def test_a_dtype_that_cannot_be_loaded_is_named(rewrite, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(64, dtype=dtype)

    with pytest.raises(BadTensor, match=r"model\.norm\.weight has dtype"):
        loaded(rewrite("llama", change))


def test_files_are_judged_before_memory_is_taken(checkpoints, tmp_path):
    """The config asks for 64 TiB of embeddings: more than there is, so an attempt to allocate would fail in another way."""
    shutil.copytree(checkpoints.folder("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 38}))
    with pytest.raises(BadTensor, match=r"model\.embed_tokens\.weight has shape \[131, 64\]"):
        make_runner(tmp_path)


def test_a_file_that_changes_while_it_is_loaded_is_named(checkpoints, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints.folder("llama"), folder)
    model = build_rank(folder, 0, 1)
    with Checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(BadTensor, match="shorter"):
            load_weights(model, checkpoint, lambda phase, done, total: None)


def test_dummy_weights_need_no_files_and_have_a_digest(checkpoints, tmp_path):
    shutil.copy(checkpoints.folder("deepseek") / "config.json", tmp_path)
    info = make_runner(tmp_path, load_format="dummy", seed=3).info_fields
    assert info["weights_digest"] == dummy_digest(info["model_config"], 3)
    assert info["weights_digest"] != make_runner(tmp_path, load_format="dummy", seed=4).info_fields["weights_digest"]
    assert make_runner(checkpoints.folder("deepseek")).info_fields["weights_digest"] is None
    assert len(weights_digest(checkpoints.folder("deepseek"))) == 16
