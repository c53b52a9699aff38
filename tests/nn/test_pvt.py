"""SegFormer's attention with fewer keys, and what it and Slim UNETR share: steps that divide the padded maps."""

import pytest
import torch

import medssm
from medssm.nn.blocks import CONV, TRANSPOSED_CONV, ChannelsLast, enlarge
from medssm.nn.pvt import ReducedAttention


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("reduction", [1, 2])
def test_reduced_attention_is_its_formula(dims, reduction):
    torch.manual_seed(0)
    attention, x = ReducedAttention(8, 2, reduction, dims).double(), torch.randn(2, *(4, 6, 2)[:dims], 8, dtype=torch.float64)
    source = x
    if reduction > 1:
        source = attention.sr_norm(attention.sr(x.movedim(-1, 1)).movedim(1, -1))
        assert isinstance(attention.sr, type(CONV[dims](1, 1, 1))) and source.shape[1] == 2
    k, v = attention.key_value(source).flatten(1, -2).chunk(2, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(attention.query(x).flatten(1, -2)[..., h] @ k[..., h].mT / 2, -1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)).view_as(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_voxel_times_the_kernel_is_the_transposed_convolution(dims, bias):
    torch.manual_seed(0)
    step = (2, 3, 1)[:dims]
    conv, x = TRANSPOSED_CONV[dims](4, 4, step, step, groups=4, bias=bias), ChannelsLast(dims)(torch.randn(2, 4, *(3, 2, 5)[:dims]))
    torch.testing.assert_close(enlarge(conv, x), conv(x))
    assert enlarge(conv, x).stride(1) == 1


def test_steps_that_no_padding_makes_fit_are_named():
    with pytest.raises(ValueError, match="reductions: expected stage 1's to divide 1, the later strides' product, got 2"):
        medssm.create_model("segformer3d", features=(8, 16), depths=(1, 1), heads=(1, 2), strides=(4, 2), reductions=(2, 2))
    with pytest.raises(ValueError, match="sparsity: expected stage 0's to divide 2, the later strides' product, got 4"):
        medssm.create_model("slim_unetr", features=(8, 16), depths=(1, 1), heads=(1, 2), sparsity=(4, 1))


def test_slim_unetrs_positions_without_a_grid_take_one_number_of_voxels():
    model = medssm.from_upstream("slim_unetr", in_channels=1, channels=(8, 8, 8), embed_dim=8, embedding_dim=2, heads=(1, 1, 1, 1)).eval()
    assert model(torch.randn(1, 1, 32, 64, 32)).shape == (1, 3, 32, 64, 32)
    with pytest.raises(ValueError, match=r"x: expected a map of 2 voxels, which the weights are made for, got \(1, 1, 1\)"):
        model(torch.randn(1, 1, 32, 32, 32))
