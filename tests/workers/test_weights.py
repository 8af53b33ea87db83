"""Reading checkpoints: shards, known extras, float8 blocks, and one error that names everything wrong."""

import json
import shutil

import pytest
import torch
from model_driver import make_runner
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


def test_dummy_weights_need_no_files_and_have_a_digest(checkpoints, tmp_path):
    shutil.copy(checkpoints.folder("deepseek") / "config.json", tmp_path)
    info = make_runner(tmp_path, load_format="dummy", seed=3).info_fields
    assert info["weights_digest"] == dummy_digest(info["model_config"], 3)
    assert info["weights_digest"] != make_runner(tmp_path, load_format="dummy", seed=4).info_fields["weights_digest"]
    assert make_runner(checkpoints.folder("deepseek")).info_fields["weights_digest"] is None
    assert len(weights_digest(checkpoints.folder("deepseek"))) == 16
