"""Shares of dimensions that ranks do not divide, and matrices before and after packing."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from workers.layers.linear import ColumnLinear, GatedMlp, RowLinear
from workers.layers.packed import Matrix, can_pack, pack_matrices
from workers.layers.parameter import Placement, whole
from workers.parallel import Communicator

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CPU = torch.device("cpu")


def placement(rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float32) -> Placement:
    return Placement(Communicator(rank, world_size, CPU, None), dtype, CPU)


@pytest.mark.parametrize("total", [1, 3, 8, 97, 1000, 1407, 11008, 18432, 28672])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8, 16])
def test_shares_cover_everything_once_and_evenly(total, world_size):
    shares = [placement(rank, world_size).share(total) for rank in range(world_size)]
    assert shares[0].start == 0
    assert shares[-1].stop == total
    assert all(before.stop == after.start for before, after in itertools.pairwise(shares))
    sizes = [share.size for share in shares]
    if total % world_size == 0:
        assert set(sizes) == {total // world_size}
    else:
        granule = 64 if total >= 512 * world_size else 1
        assert max(sizes) - min(sizes) <= max(2 * granule, total // (4 * world_size))
        assert all(share.start % granule == 0 for share in shares)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 17, 300])
def test_a_packed_matrix_multiplies_alike(bias, num_rows):
    torch.manual_seed(num_rows)
    layer = ColumnLinear(placement(), 48, [whole(33), whole(70)], bias=bias)
    for parameter in layer.parameters():
        parameter.data.normal_()
    weight = layer.weight.data.clone()
    x_TI = torch.randn(num_rows, 96)[:, ::2]  # not contiguous
    with torch.inference_mode():
        before = layer(x_TI)
        layer.pack()
        after = layer(x_TI)
        alone = layer(x_TI[:1])
    torch.testing.assert_close(before, F.linear(x_TI, weight, layer.bias), atol=1e-4, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, after[:1], atol=1e-4, rtol=0)
    if can_pack(torch.float32):
        assert layer.weight is None  # one copy, not two


def test_what_is_not_packed_stays_as_it_was():
    plain = ColumnLinear(placement(), 8, [whole(4)], plain=True)
    half = ColumnLinear(placement(dtype=torch.bfloat16), 8, [whole(4)])
    for layer in (plain, half):
        layer.pack()
        assert layer.weight is not None


def test_ranks_without_a_share_add_nothing():
    """Three rows over eight ranks: what the ranks compute adds up to what one computes."""
    torch.manual_seed(0)
    alone = GatedMlp(placement(), 16, 3, bias=True)
    for parameter in alone.parameters():
        parameter.data.normal_()
    x_TH, total = torch.randn(5, 16), torch.zeros(5, 16)
    for rank in range(8):
        mine = GatedMlp(placement(rank, 8), 16, 3, bias=True, reduce=False)
        share = placement(rank, 8).share(3)
        gate_up = torch.cat([torch.arange(share.start, share.stop), torch.arange(share.start, share.stop) + 3])
        mine.gate_up_proj.weight.data.copy_(alone.gate_up_proj.weight.data[gate_up])
        mine.gate_up_proj.bias.data.copy_(alone.gate_up_proj.bias.data[gate_up])
        mine.down_proj.weight.data.copy_(alone.down_proj.weight.data[:, share.start : share.stop])
        mine.down_proj.bias.data.copy_(alone.down_proj.bias.data)
        pack_matrices(mine)
        assert isinstance(mine.down_proj, RowLinear | Matrix)
        with torch.inference_mode():
            total += mine(x_TH)
    torch.testing.assert_close(total, alone(x_TH), atol=1e-4, rtol=0)
