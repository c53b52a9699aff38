"""The other linear-time mixers: MLLA's and EfficientViT's attention, gated linear attention, RWKV; all of them by name."""

import pytest
import torch

from medssm import nn, orders
from medssm.models import mlla
from medssm.nn.mixers import MIXERS, heads, make_mixer
from medssm.nn.mlla import rotations

SIZES = {2: [(5, 7), (1, 6)], 3: [(3, 4, 5), (1, 1, 4)]}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_takes_any_size_under_autocast_and_learns(name, dims):
    torch.manual_seed(0)
    mixer = make_mixer(name, 12, dims)
    for size in SIZES[dims]:
        x = torch.randn(2, *size, 12)
        y = mixer(x)
        assert y.shape == x.shape and y.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            half = mixer(x)
        assert half.isfinite().all()
        torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1 * y.abs().max().item())
    x = torch.randn(1, *SIZES[dims][0], 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()
    for weight, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, weight


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("rwkv",)])
def test_every_voxel_sees_every_other(name):
    torch.manual_seed(0)
    mixer, x = make_mixer(name, 12, 2), torch.randn(1, 4, 5, 12, requires_grad=True)
    for at in ((0, 0), (3, 4)):
        seen = torch.autograd.grad(mixer(x)[0, at[0], at[1]].square().sum(), x)[0]
        assert (seen.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["gla", *(pytest.param(name, marks=pytest.mark.thorough) for name in MIXERS if name not in ("ss_nd", "gla"))])
def test_every_mixer_compiles_whole(name):
    torch.manual_seed(0)
    mixer, x = make_mixer(name, 12, 2).eval(), torch.randn(1, 4, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_rotations_made_while_exporting_are_not_kept():
    torch.manual_seed(0)
    mixer, x = make_mixer("linear_attention", 12, 2).eval(), torch.randn(1, 7, 3, 12)
    with torch.no_grad():
        program = torch.export.export(mixer, (x,)).module()
        torch.testing.assert_close(program(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_names_and_options_of_mixers():
    with pytest.raises(ValueError, match=r"mixer: expected one of ss_nd, linear_attention, gla, .*, got 'attention'"):
        make_mixer("attention", 8, 2)
    with pytest.raises(ValueError, match="d_state: expected None, which mixer='rwkv' has not, got 4"):
        make_mixer("rwkv", 8, 2, d_state=4)
    assert make_mixer("ss_nd", 8, 2, d_state=4, expand=None).d_state == 4
    assert [heads(c, 16) for c in (7, 16, 48, 96, 160)] == [1, 1, 3, 6, 10]


# -- MLLA -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [((3, 5), 8), ((2, 3, 4), 14)])
def test_rotations_are_angles_of_positions(size, channels):
    """As complex numbers, channel pair by pair, for the position along one axis after the other; what is left over stays."""
    cos, sin = rotations(size, channels, torch.device("cpu"))
    turned = torch.view_as_complex(torch.stack((cos, sin), -1).double()).view(*size, channels)
    per_axis = channels // (2 * len(size))
    for position in torch.cartesian_prod(*(torch.arange(n) for n in size)):
        want = [torch.exp(1j * position[a].double() * 10000.0 ** (-j / per_axis)) for a in range(len(size)) for j in range(per_axis)]
        want = torch.stack(want + [torch.ones_like(want[0])] * (channels // 2 - len(want))).repeat_interleave(2)
        torch.testing.assert_close(turned[tuple(position)], want, rtol=1e-6, atol=1e-6)


def test_rotations_are_made_once_and_serve_after_inference_mode():
    with torch.inference_mode():
        first = rotations((3, 6), 8, torch.device("cpu"))
    assert rotations((3, 6), 8, torch.device("cpu"))[0] is first[0] and not first[0].is_inference()


@pytest.mark.parametrize("dims", [2, 3])
def test_mllas_attention_equals_the_quadratic_form(dims):
    torch.manual_seed(0)
    size = (3, 5, 2)[:dims]
    attention = nn.LinearAttention(12, 2, dims).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    q, k = (torch.nn.functional.elu(t) + 1 for t in attention.qk(x).flatten(1, -2).chunk(2, -1))
    cos, sin = rotations(size, 12, torch.device("cpu"), torch.float64)

    def turn(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, ::2]).flatten(-2)

    split = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, turn(q), turn(k), x.flatten(1, -2))]
    numerator = split[2] @ split[3].mT @ split[4]
    length = x[0, ..., 0].numel()
    o = numerator / (split[0] @ split[1].sum(-2, keepdim=True).mT + 1e-6 * length)
    conv = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d
    lepe = conv(x.movedim(-1, 1), attention.lepe.weight, attention.lepe.bias, padding=1, groups=12).movedim(1, -1)
    torch.testing.assert_close(attention(x), o.transpose(1, 2).reshape_as(x) + lepe, rtol=1e-6, atol=1e-6)


def test_an_mlla_block_of_upstream_takes_its_table_of_rotations():
    """Upstream keeps it with the weights; it is dropped and made anew."""
    block = mlla.upstream_block(8, (2, 3), 2)
    state = {k.removeprefix("mixer."): v for k, v in block.state_dict().items()} | {"attn.rope.rotations": torch.randn(2, 3, 4, 2)}
    assert mlla.BLOCK_MAP(state).keys() == block.state_dict().keys()


def test_heads_of_mlla_are_named():
    with pytest.raises(ValueError, match="heads: expected a number that divides 12 channels into even parts, got 4"):
        nn.LinearAttention(12, 4)


# -- EfficientViT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_lite_mla_equals_the_quadratic_form(dims):
    torch.manual_seed(0)
    size = (4, 3, 2)[:dims]
    mixer = nn.LiteMLA(16, dim=8, scales=(3, 5), spatial_dims=dims).double().eval()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    qkv = mixer.qkv(x.movedim(-1, 1))
    maps = torch.cat([qkv, *(local(qkv) for local in mixer.aggreg)], 1)
    q, k, v = maps.flatten(2).unflatten(1, (-1, 24)).mT.chunk(3, -1)  # (b, heads of all scales, l, 8)
    weights = torch.relu(q) @ torch.relu(k).mT
    o = weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)
    want = mixer.proj(o.mT.reshape(2, -1, *size)).movedim(1, -1)
    torch.testing.assert_close(mixer(x), want, rtol=1e-6, atol=1e-6)


def test_an_efficientvit_block_is_residual():
    torch.manual_seed(0)
    block, x = nn.EfficientViTBlock(16, dim=8, spatial_dims=3).eval(), torch.randn(1, 16, 3, 4, 5)
    middle = x + block.context_module.main(x)
    torch.testing.assert_close(block(x), middle + block.local_module.main(middle))


# -- gated linear attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["key", "head"])
@pytest.mark.parametrize("dims", [2, 3])
def test_gated_attention_is_a_sum_over_orders(dims, decay):
    torch.manual_seed(0)
    mixer = nn.GatedLinearAttention(8, 2, decay=decay, rank=3, spatial_dims=dims, gate=None)
    mixer.o_norm, mixer.o_proj = torch.nn.Identity(), torch.nn.Identity()
    x, total = torch.randn(2, *(3, 4, 2)[:dims], 8), 0
    for i, order in enumerate(mixer.orders):
        one = nn.GatedLinearAttention(8, 2, decay=decay, rank=3, spatial_dims=dims, gate=None, orders=[order])
        one.o_norm, one.o_proj = torch.nn.Identity(), torch.nn.Identity()
        one.load_state_dict({k: v[i : i + 1] if k in ("decay_weight", "decay_bias") else v for k, v in mixer.state_dict().items()})
        total = total + one(x)
    torch.testing.assert_close(mixer(x), total, rtol=1e-4, atol=1e-5)


def test_gated_attention_the_other_way_round_is_flipped():
    torch.manual_seed(0)
    there = nn.GatedLinearAttention(8, 2, orders=[orders.raster()])
    back = nn.GatedLinearAttention(8, 2, orders=[orders.raster(reverse=True)])
    back.load_state_dict(there.state_dict())
    x = torch.randn(1, 3, 4, 8)
    torch.testing.assert_close(back(x), there(x.flip(1, 2)).flip(1, 2), rtol=1e-4, atol=1e-5)


def test_arguments_of_gated_attention_are_named():
    with pytest.raises(ValueError, match="decay: expected 'key' or 'head', got 'value'"):
        nn.GatedLinearAttention(8, 2, decay="value")
    with pytest.raises(ValueError, match="heads: expected a number that divides 4 channels of keys and 8 of values, got 3"):
        nn.GatedLinearAttention(8, 3)
    with pytest.raises(ValueError, match="orders: expected a list of orders for spatial_dims=1"):
        nn.GatedLinearAttention(8, 2, spatial_dims=1)
    with pytest.raises(ValueError, match="gate: expected 'silu' or None, got 'relu'"):
        nn.GatedLinearAttention(8, 2, gate="relu")


# -- RWKV -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 2, 9])
@pytest.mark.parametrize("dims", [2, 3])
def test_q_shift_moves_a_group_along_each_direction(dims, pixels):
    channels = {2: 9, 3: 14}[dims]
    x = torch.randn(2, *(4, 3, 5)[:dims], channels)
    y, width = nn.q_shift(x, pixels), channels // (2 * dims)
    for i, (axis, step) in enumerate((axis, step) for axis in range(dims, 0, -1) for step in (1, -1)):
        want = torch.zeros_like(x[..., :width])
        for t in range(x.shape[axis]):
            if 0 <= t - step * pixels < x.shape[axis]:
                want.select(axis, t).copy_(x[..., i * width : (i + 1) * width].select(axis, t - step * pixels))
        assert torch.equal(y[..., i * width : (i + 1) * width], want)
    assert torch.equal(y[..., 2 * dims * width :], x[..., 2 * dims * width :])


def test_a_share_too_large_is_named():
    with pytest.raises(ValueError, match=r"share: expected at most 1/6, a group for each direction, got 0.25"):
        nn.q_shift(torch.randn(1, 2, 2, 2, 12), share=0.25)


@pytest.mark.parametrize("mode", ["exact", "upstream"])
def test_spatial_mix_along_an_order_is_the_mix_of_turned_axes(mode):
    torch.manual_seed(0)
    plain, turned = nn.SpatialMix(6, pixels=0, mode=mode), nn.SpatialMix(6, pixels=0, mode=mode, order=orders.raster((1, 0)))
    turned.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(turned(x), plain(x.transpose(1, 2)).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_channel_mix_sees_the_neighbours_alone():
    torch.manual_seed(0)
    mix, x = nn.ChannelMix(12, key_norm=True), torch.randn(1, 5, 5, 12, requires_grad=True)
    seen = torch.autograd.grad(mix(x)[0, 2, 2].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.sum() == 5 and seen[2, 1:4].all() and seen[1:4, 2].all()


def test_what_a_fake_mode_made_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, layer = torch.randn(1, 5, 7, 8), nn.MLLA(8, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(1, 5, 7, 8))
    assert type(layer(x)) is torch.Tensor and torch.isfinite(layer(x)).all()
