"""Groups of ranks against one rank: the same tokens, nearly the same scores, the same blocks in the store."""

import numpy as np
import pytest
import torch
from checkpoints import CONFIGS
from model_driver import build_rank, gather_tensors
from rank_processes import run_groups, run_scenario
from safetensors.torch import load_file

from workers.checkpoint import Checkpoint
from workers.dummy import dummy_weights
from workers.parallel import Communicator
from workers.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ["llama", "qwen3", "deepseek", "llama-cut-groups", "deepseek-v2"]),
        (4, ["llama-tied-bias", "deepseek-plain-q", "llama-cut-groups", "deepseek-v2-lite"]),  # the first has fewer heads than ranks
    ],
)
def test_ranks_together_do_what_one_does(checkpoints, world_size, names):
    for name, ranks in zip(names, run_groups(world_size, [checkpoints.folder(name) for name in names]), strict=True):
        alone = run_scenario(checkpoints.folder(name), Communicator.single("cpu"))
        assert all(outcome.known == alone.known for outcome in ranks)
        np.testing.assert_allclose(ranks[0].scores, alone.scores, atol=1e-4, rtol=0)
        part_bytes = alone.layout.store.part_bytes
        for block, whole in alone.pages.items():
            assembled = np.zeros_like(whole)
            for outcome in ranks:
                layout = outcome.layout
                parts = outcome.pages[block].reshape(layout.num_parts, part_bytes)
                first = layout.first_written_part
                written = parts[first - layout.first_part :][: layout.num_written_parts]
                assembled.reshape(-1, part_bytes)[first : first + layout.num_written_parts] = written
            np.testing.assert_allclose(assembled.view("<f4"), whole.view("<f4"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "llama-cut-groups", "deepseek", "deepseek-v2-lite"])
def test_dummy_weights_do_not_depend_on_the_number_of_ranks(checkpoints, name):
    gathered = []
    for world_size in (1, 2, 4):
        models = [build_rank(checkpoints.folder(name), rank, world_size) for rank in range(world_size)]
        for model in models:
            dummy_weights(model, 5, lambda phase, done, total: None)
        gathered.append(gather_tensors(models))
    assert gathered[0].keys() == gathered[1].keys() == gathered[2].keys()
    for tensor, whole in gathered[0].items():
        assert not whole.isnan().any()
        assert torch.equal(whole, gathered[1][tensor])
        assert torch.equal(whole, gathered[2][tensor])
        if whole.dim() == 2:
            assert whole.std() == pytest.approx(0.02, rel=0.1)
    other = build_rank(checkpoints.folder(name), 0, 1)
    dummy_weights(other, 6, lambda phase, done, total: None)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(gather_tensors([other])[embedding], gathered[0][embedding])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_ranks_read_every_tensor_between_them(checkpoints, name, world_size):
    """Against the tensors as transformers reads them."""
    folder = checkpoints.folder(name)
    models = [build_rank(folder, rank, world_size) for rank in range(world_size)]
    with Checkpoint(folder) as checkpoint:
        for model in models:
            load_weights(model, checkpoint, lambda phase, done, total: None)
    stored = load_file(folder / "model.safetensors")
    for tensor, whole in gather_tensors(models).items():
        assert torch.equal(whole, stored[tensor]), tensor
