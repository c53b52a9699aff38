"""What every rank checks of itself: its part of what one process computes."""

import copy
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from medssm import ops, orders
from medssm.models.medssm_unet import medssm_unet
from medssm.nn.instance_norm import InstanceNorm3d
from medssm.nn.mixers import MIXERS
from medssm.nn.rwkv import q_shift
from medssm.parallel import RankError, Slabs

ORDERS = [
    orders.raster(),
    orders.raster((1, 2, 0), reverse=True),
    orders.raster((2, 0, 1)),
    orders.snake(),
    orders.snake((2, 1, 0), reverse=True),
    orders.hilbert(),
    orders.zigzag(reverse=True),
    orders.interleaved(None),
]
SEGMENTED = [orders.window((2, 3, 2)), orders.window(3, reverse=True), orders.dilated((2, 1, 2)), orders.dilated(2, reverse=True)]
SHAPE = (7, 5, 4)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(found, wanted, what, tolerance=1e-10):
    scale = wanted.abs().max().clamp(min=1e-6)
    error = ((found - wanted).abs().max() / scale).item() if wanted.numel() else 0.0
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    assert error <= tolerance, f"{what}: error {error:.2e}"


def compared(function, tensors, cut, axis=0, shape=SHAPE, dim=None, what="", tolerance=1e-10):
    """function(**tensors) over the ranks equals that of the whole: the output, further ones (the same on all ranks) and gradients. cut: the names of
    the tensors that are cut, along `dim`, default 1 + axis."""
    dim = 1 + axis if dim is None else dim
    whole = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    wanted, *states = function(**whole)
    g = [draw(*t.shape, seed=9).to(t.dtype) for t in (wanted, *states)]
    slabs = Slabs(nn.Identity(), shape, axis, multiple=1)
    mine = {name: _own(slabs, t, dim) if name in cut else t.clone() for name, t in tensors.items()}
    mine = {name: t.detach().clone().requires_grad_() for name, t in mine.items()}
    with slabs:
        out, *last = function(**mine)
    same(out, _own(slabs, wanted, dim), f"{what} out", tolerance)
    for found, state in zip(last, states, strict=True):
        same(found, state, f"{what} state", tolerance)
    names, count = list(tensors), slabs.ranks.count
    loss = sum((t * d).sum() for t, d in zip((wanted, *states), g, strict=True))
    dwanted = torch.autograd.grad(loss, [whole[name] for name in names])
    # The states are the same on all ranks: each has its share of their loss.
    loss = (out * _own(slabs, g[0], dim)).sum() + sum((t * d).sum() for t, d in zip(last, g[1:], strict=True)) / count
    dfound = torch.autograd.grad(loss, [mine[name] for name in names], materialize_grads=True)
    for name, found, whole_one in zip(names, dfound, dwanted, strict=True):
        if name in cut:
            same(found, _own(slabs, whole_one, dim), f"{what} d{name}", tolerance)
        else:
            same(slabs.total(found), whole_one, f"{what} d{name}", tolerance)


def _own(slabs, t, dim):
    """This rank's rows of a tensor of the whole, whose rows may be more or fewer than the volume's."""
    full = slabs.bounds[-1]
    begin, end = (bound * t.shape[dim] // full for bound in slabs.bounds[slabs.ranks.rank : slabs.ranks.rank + 2])
    return t.narrow(dim, begin, end - begin)


# -- ops -------------------------------------------------------------------------------------------------------------------------------------------


def _selective(order, final):
    tensors = {"u": draw(2, *SHAPE, 4), "delta": draw(2, *SHAPE, 2, seed=1), "A": -draw(4, 3, seed=2).abs() / 4, "B": draw(2, *SHAPE, 3, seed=3)}
    tensors |= {"C": draw(2, *SHAPE, 3, seed=4), "D": draw(4, seed=5), "z": draw(2, *SHAPE, 4, seed=6), "delta_proj": draw(4, 2, seed=7)}
    tensors |= {"delta_bias": draw(4, seed=8)} | ({"initial_state": draw(2, 4, 3, seed=9)} if final else {})
    return ops.selective_scan, tensors, "u delta B C z", {"delta_softplus": True}


def _ssd(order, final):
    tensors = {"x": draw(2, *SHAPE, 2, 3), "dt": draw(2, *SHAPE, 2, seed=1), "A": -draw(2, seed=2).abs() / 4, "B": draw(2, *SHAPE, 1, 3, seed=3)}
    tensors |= {"C": draw(2, *SHAPE, 1, 3, seed=4), "dt_bias": draw(2, seed=8)} | ({"initial_state": draw(2, 2, 3, 3, seed=9)} if final else {})
    return ops.ssd, tensors, "x dt B C", {"dt_softplus": True, "dt_limit": (0.0, 1.0)}


def _ssd3(order, final, several=False):
    """several: ranks of a token, whose outputs are not summed."""
    r = (3,) if several else ()
    tensors = {"x": draw(2, *SHAPE, 2, 3), "dt": draw(2, *SHAPE, 2, seed=1).sigmoid() / 4, "A": -draw(2, *SHAPE, 2, seed=2).abs() / 4}
    tensors |= {"B": draw(2, *SHAPE, *r, 1, 4, seed=3), "C": draw(2, *SHAPE, *r, 1, 4, seed=4), "trap": draw(2, *SHAPE, 2, seed=5)}
    tensors |= {"angles": draw(2, *SHAPE, 1, seed=6), "D": draw(2, seed=7), "z": draw(2, *SHAPE, 2, 3, seed=8)}
    tensors |= {"B_bias": draw(2, *r, 4, seed=10), "C_bias": draw(2, *r, 4, seed=11)} | ({"mimo_x": draw(2, 3, 3, seed=12)} if several else {})
    if final:
        tensors |= {"angle": draw(2, 2, 1, seed=13), "state": draw(2, 2, 3, 4, seed=14), "k": draw(2, *r, 2, 4, seed=15), "v": draw(2, 2, 3, seed=16)}

    def call(angle=None, state=None, k=None, v=None, **given):
        return ops.ssd3(**given, initial_state=None if angle is None else (angle, state, k, v))

    return call, tensors, "x dt A B C trap angles z", {"pairs": "halves" if several else "adjacent"}


def _gated(order, final, by_head=False):
    tensors = {"q": draw(2, *SHAPE, 2, 3), "k": draw(2, *SHAPE, 2, 3, seed=1), "v": draw(2, *SHAPE, 2, 4, seed=2)}
    tensors |= {"g": -draw(*(2, *SHAPE, 2), *(() if by_head else (3,)), seed=3).abs() / 8}
    return ops.gated_linear_attention, tensors | ({"initial_state": draw(2, 2, 3, 4, seed=9)} if final else {}), "q k v g", {}


def _delta(order, final, general=False):
    tensors = {"q": draw(2, *SHAPE, 2, 3), "k": functional.normalize(draw(2, *SHAPE, 2, 3, seed=1), dim=-1), "v": draw(2, *SHAPE, 2, 4, seed=2)}
    tensors |= {"beta": draw(2, *SHAPE, 2, seed=3).sigmoid() / 4, "g": -draw(2, *SHAPE, 2, seed=4).abs() / 8}
    if general:
        tensors |= {"erase": tensors["k"] / 8, "erase_out": draw(2, *SHAPE, 2, 3, seed=5) / 8, "write": draw(2, *SHAPE, 2, 4, seed=6).sigmoid()}
    tensors |= {"initial_state": draw(2, 2, 3, 4, seed=9)} if final else {}
    return ops.delta_rule, tensors, "q k v beta g erase erase_out write", {"erase_first": general}


def _taps(order, final):
    tensors = {"x": draw(2, *SHAPE, 4), "weight": draw(4, 4, seed=1), "bias": draw(4, seed=2)}
    return ops.causal_conv1d, tensors | ({"initial_state": draw(2, 4, 3, seed=9)} if final else {}), "x", {"activation": "silu"}


def _linear(order, final, causal=True):
    tensors = {"q": draw(2, *SHAPE, 2, 4), "k": draw(2, *SHAPE, 2, 4, seed=1), "v": draw(2, *SHAPE, 2, 3, seed=2)}
    tensors |= {"kv": draw(2, 2, 4, 3, seed=8), "z0": draw(2, 2, 4, seed=9).abs()} if final else {}

    def call(q, k, v, kv=None, z0=None, return_final_state=False, **rest):
        found = ops.linear_attention(
            q, k, v, causal=causal, initial_state=None if kv is None else (kv, z0), return_final_state=return_final_state, **rest
        )
        return (found[0], found[1]) if return_final_state else found

    return call, tensors, "q k v", {}


def _scan(make, order, axis, final, **more):
    function, tensors, cut, options = make(order, final, **more)

    def call(**given):
        found = function(**given, **options, order=order, return_final_state=final)
        out, state = found if final else (found, ())
        return (out, *(state if isinstance(state, tuple) else (state,)))

    compared(call, tensors, cut.split(), axis, what=f"{function.__name__} {order} axis {axis}")


def _scans(make, **more):
    for i, order in enumerate(ORDERS):
        _scan(make, order, i % 3, final=i % 2 == 0, **more)
    for i, order in enumerate(SEGMENTED):
        _scan(make, order, (0, 1, 2, 0)[i], final=False, **more)


def selective_scan():
    _scans(_selective)


def ssd():
    _scans(_ssd)


def ssd3():
    _scans(_ssd3)
    _scan(_ssd3, orders.raster((1, 0, 2)), 1, final=True, several=True)


def gated_linear_attention():
    _scans(_gated)
    _scan(_gated, orders.raster(), 0, final=True, by_head=True)


def delta_rule():
    _scans(_delta)
    _scan(_delta, orders.raster(), 0, final=True, general=True)


def causal_conv1d():
    _scans(_taps)


def linear_attention():
    _scans(_linear)
    _scan(_linear, orders.raster(), 1, final=True, causal=False)


def selective_scan_nd():
    walks = [*orders.axes3d(), orders.snake((1, 0, 2)), orders.window(2)]
    k = len(walks)
    tensors = {"x": draw(2, *SHAPE, 4), "delta": draw(2, *SHAPE, k, 2, seed=1), "A": -draw(k, 4, 3, seed=2).abs() / 4}
    tensors |= {"B": draw(2, *SHAPE, k, 3, seed=3), "C": draw(2, *SHAPE, k, 3, seed=4), "D": draw(k, 4, seed=5), "z": draw(2, *SHAPE, 4, seed=6)}
    tensors |= {"delta_proj": draw(k, 4, 2, seed=7), "delta_bias": draw(k, 4, seed=8)}
    for axis, merge in enumerate(("sum", "mean", "stack")):
        compared(
            lambda merge=merge, **t: (ops.selective_scan_nd(**t, delta_softplus=True, orders=walks, merge=merge),), tensors, "x delta B C z", axis
        )
    each = tensors | {"x": draw(2, *SHAPE, k, 4)}
    compared(lambda **t: (ops.selective_scan_nd(**t, orders=walks),), each | {"delta": each["delta"].abs()}, ["x", "delta", "B", "C", "z"], 0)


def bi_wkv():
    tensors = {"w": draw(4).abs() / 140, "u": draw(4, seed=1), "k": draw(2, *SHAPE, 4, seed=2), "v": draw(2, *SHAPE, 4, seed=3)}
    for i, order in enumerate(ORDERS):
        compared(lambda order=order, **t: (ops.bi_wkv(**t, order=order),), tensors, ["k", "v"], i % 3, tolerance=1e-8)
    flat = {name: t.flatten(1, 3) if t.dim() > 1 else t for name, t in tensors.items()}  # the voxels as a sequence
    compared(lambda **t: (ops.bi_wkv(**t),), flat, ["k", "v"], 0, tolerance=1e-8)


def depthwise_conv():
    for axis in range(3):
        tensors = {"x": draw(2, *SHAPE, 4), "weight": draw(4, 5, 3, 1, seed=1), "bias": draw(4, seed=2)}
        compared(lambda **t: (ops.depthwise_conv(**t, activation="silu"),), tensors, ["x"], axis)


def shifts():
    for axis in range(3):
        compared(lambda x: (q_shift(x, 2),), {"x": draw(2, *SHAPE, 13)}, ["x"], axis)


# -- functions -------------------------------------------------------------------------------------------------------------------------------------

LAYERS = {
    "convolution": (nn.Conv3d, (3, 4, 3), {"padding": 1}),
    "kernels": (nn.Conv3d, (3, 4, (5, 1, 3)), {"padding": (2, 0, 1), "bias": False}),
    "dilated": (nn.Conv3d, (4, 4, 3), {"padding": 2, "dilation": 2, "groups": 2}),
    "same": (nn.Conv3d, (3, 4, 3), {"padding": "same"}),
    "strided": (nn.Conv3d, (3, 4, 3), {"stride": 2, "padding": 1}),
    "patches": (nn.Conv3d, (3, 4, 2), {"stride": 2}),
    "strided, wide": (nn.Conv3d, (3, 4, 7), {"stride": 4, "padding": 3}),
    "transposed": (nn.ConvTranspose3d, (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed patches": (nn.ConvTranspose3d, (3, 4, 2), {"stride": 2}),
    "transposed, wide": (nn.ConvTranspose3d, (3, 4, 4), {"stride": 2, "padding": 1}),
    "transposed, far": (nn.ConvTranspose3d, (3, 4, 5), {"stride": 1, "padding": 2}),
    "transposed, gaps": (nn.ConvTranspose3d, (3, 4, 1), {"stride": 2, "output_padding": 1}),
    "pooling": (nn.MaxPool3d, (3, 2, 1), {}),
    "batch norm": (nn.BatchNorm3d, (3,), {}),
    "instance norm": (nn.InstanceNorm3d, (3,), {"affine": True}),
    "instance norm, ours": (InstanceNorm3d, (3,), {"affine": True}),
    "group norm": (nn.GroupNorm, (3, 3), {}),
    "upsampling": (nn.Upsample, (), {"scale_factor": 2}),
}


def layers():
    """Slabs of 8 and 4 rows."""
    for name, (kind, args, options) in LAYERS.items():
        torch.manual_seed(0)
        layer = kind(*args, **options).double()
        channels = 4 if name == "dilated" else 3
        tensors = dict(layer.named_parameters()) | {"x": draw(2, channels, 12, 8, 8).to(memory_format=torch.channels_last_3d)}
        tensors = {key.replace(".", "_"): t.detach() for key, t in tensors.items()}
        for axis in range(3):
            shape = [8, 8, 8]
            shape[axis] = 12
            tensors["x"] = draw(2, channels, *shape, seed=axis).to(memory_format=torch.channels_last_3d)

            def call(x, layer=layer, **weights):
                return (torch.func.functional_call(copy.deepcopy(layer), weights, (x,)),)

            try:
                _layer(call, tensors, axis, shape, name)
            except Exception as error:
                raise AssertionError(f"{name}, axis {axis}") from error


def _layer(call, tensors, axis, shape, name):
    import tests.parallel.checks as here

    original = here.Slabs
    here.Slabs = lambda network, shape, axis, multiple: original(network, shape, axis, multiple=4)
    try:
        compared(call, tensors, ["x"], axis, shape, 2 + axis, name)
    finally:
        here.Slabs = original


# -- networks --------------------------------------------------------------------------------------------------------------------------------------


def _network(**options):
    torch.manual_seed(0)
    small = {"features": (7, 8, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0), "strides": (1, 2, 2)}
    return medssm_unet(**{"size": "tiny", "out_channels": 3, **small, **options})


def _trained(network, shape, axis, dtype=torch.float32, tolerance=1e-5):
    """One step of a network: logits, gradients and statistics."""
    network.to(dtype)
    other = copy.deepcopy(network)
    x = draw(2, 1, *shape).to(dtype)
    wanted = network(x)
    several = isinstance(wanted, list)
    g = [draw(*o.shape, seed=1).to(dtype) for o in (wanted if several else [wanted])]
    sum((o * d).sum() for o, d in zip(wanted if several else [wanted], g, strict=True)).backward()
    slabs = Slabs(other, shape, axis)
    with slabs:
        out = other(slabs.split(x))
    whole = slabs.gather(out)
    for found, one in zip(whole if several else [whole], wanted if several else [wanted], strict=True):
        same(found, one, "logits", tolerance)
    loss = torch.zeros((), dtype=dtype)
    for o, d in zip(slabs.crop(out) if several else [slabs.crop(out)], g, strict=True):
        begin = slabs.place((out[0] if several else out).shape[2 + axis])[slabs.ranks.rank] * d.shape[2 + axis] // g[0].shape[2 + axis]
        loss = loss + (o * d.narrow(2 + axis, begin, o.shape[2 + axis])).sum()
    loss.backward()
    slabs.add_gradients(other)
    largest = max(p.grad.abs().max().item() for p in network.parameters() if p.grad is not None)
    for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
            continue
        error = (q.grad - p.grad).abs().max().item()
        assert error <= tolerance * max(p.grad.abs().max().item(), largest / 100), f"gradient of {name}: error {error:.2e}"
    for (name, b), c in zip(network.named_buffers(), other.named_buffers(), strict=True):
        same(c[1].double(), b.double(), name, tolerance)


def networks():
    """Every mixer, slabs of 12 and 8 rows of 18, the last two rows zeros."""
    for mixer in MIXERS:
        try:
            _trained(_network(mixer=mixer), (18, 8, 12), 0)
        except Exception as error:
            raise AssertionError(mixer) from error


def other_axes():
    _along_other_axes("ss_nd")


def other_axes_of_every_mixer():
    for mixer in MIXERS:
        if mixer != "rwkv":  # its sequence of voxels is cut along the first axis alone
            _along_other_axes(mixer)


def _along_other_axes(mixer):
    _trained(_network(mixer=mixer), (8, 8, 16), 2, torch.float64, 1e-9)
    _trained(_network(mixer=mixer, spatial_dims=2), (16, 24), 1, torch.float64, 1e-9)


def deep_supervision():
    _trained(_network(deep_supervision=True), (16, 8, 8), 0, torch.float64, 1e-9)


def inference():
    network = _network().eval()
    x = draw(1, 1, 24, 9, 8).float()
    slabs = Slabs(network, x.shape[2:])
    with torch.inference_mode(), slabs:
        found = slabs.gather(network(slabs.split(x)))
    with torch.inference_mode():
        same(found, network(x), "logits", 1e-5)
    with slabs:
        network(slabs.split(x)).sum().backward()  # what inference has kept does not stop a training


# -- errors ----------------------------------------------------------------------------------------------------------------------------------------


def errors():
    """One clear line, on every rank."""
    for shape, axis, options, expected in (
        ((12, 8, 8), 3, {}, "axis: expected 0 to 2, got 3"),
        ((4, 8, 8), 0, {}, "shape: expected more than 4 voxels along axis 0, a part of 4 for each of 2 ranks, got (4, 8, 8)"),
        ((8, 8, 8), 0, {"network": nn.Sequential(nn.Softmax2d())}, "network: 0 (Softmax2d) is no layer that is known to work on slabs"),
        ((8, 8, 8), 0, {"network": nn.Conv3d(1, 1, 3, padding=1, padding_mode="reflect")}, "expected padding with zeros, got padding_mode='reflect'"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            Slabs(options.get("network", _network()), shape, axis)
    slabs, x = Slabs(nn.Identity(), (4, 3, 3), multiple=2), draw(1, 2, 3, 3, 4)
    kept = {"order": torch.arange(18)}
    calls = [
        (lambda: nn.Conv3d(4, 4, 2).double()(x.movedim(-1, 1)), "expected a layer with one row of its output for every 1 of its input along axis 0"),
        (lambda: nn.ConvTranspose3d(4, 4, 3, 2).double()(x.movedim(-1, 1)), "expected a layer with 2 rows of its output for each"),
        (lambda: nn.AdaptiveAvgPool3d(1)(x.movedim(-1, 1)), "adaptive_avg_pool3d: it sees along space in a way that is not done over ranks"),
        (lambda: functional.interpolate(x.movedim(-1, 1), scale_factor=2, mode="trilinear"), "interpolate: expected mode='nearest'"),
        (lambda: ops.causal_conv1d(x.flatten(1, 3), draw(4, 2), **kept), "order: expected an Order over ranks"),
        (lambda: ops.causal_conv1d(x.flatten(1, 3), draw(4, 2), cu_seqlens=torch.tensor([0, 18])), "cu_seqlens: expected None over ranks"),
        (lambda: ops.bi_wkv(draw(4).abs(), draw(4), x, x, mode="upstream", order=orders.raster()), "mode: expected 'exact' over ranks"),
        (lambda: ops.depthwise_conv(x[:, :, 0], draw(4, 3, 3)), "axis: expected tokens (b, *spatial, …) with 3 spatial axes"),
    ]
    for call, expected in calls:
        with slabs, pytest.raises(ValueError, match=re.escape(expected)):
            call()
    with slabs, pytest.raises(ValueError, match="a block inside another one"), slabs:
        pass
    with pytest.raises(ValueError, match=re.escape("volume: expected (b, c, 4, 3, 3), got (1, 1, 4, 3, 2)")):
        slabs.split(torch.zeros(1, 1, 4, 3, 2))


def late():
    """Who waits for a rank that is late ends with one clear line."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    slabs = Slabs(nn.Identity(), (4, 3, 3), group=group, multiple=1)
    if slabs.ranks.rank == 1:
        time.sleep(2)
        return
    with pytest.raises(RankError, match=r"^rank 0: rank 1 of 2 has ended, or did not answer in time \(.*\)$"):
        slabs.gather(torch.zeros(1, 1, 2, 3, 3))
