"""EMCAD's decoder against the same arithmetic written out in plain PyTorch, with weights under upstream's names."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from medssm.models.emcad import MAP
from medssm.nn.emcad import EMCADDecoder

WIDTHS = (32, 20, 16, 8)  # from coarse to fine
ACTS = {"relu": (torch.nn.ReLU, F.relu), "hswish": (torch.nn.Hardswish, F.hardswish)}


def drawn(expand, kernels, add, gate_kernel, classes=3):
    """A state of upstream's decoder and heads."""
    torch.manual_seed(0)
    state = {}

    def conv(name, out, each, k=1, bias=True):
        state[f"{name}.weight"] = torch.randn(out, each, k, k) / math.sqrt(each * k * k)
        if bias:
            state[f"{name}.bias"] = torch.randn(out)

    def norm(name, c):
        state.update({f"{name}.weight": torch.rand(c) + 0.5, f"{name}.bias": torch.randn(c)})
        state.update({f"{name}.running_mean": torch.randn(c), f"{name}.running_var": torch.rand(c) + 0.5})
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    for level, c in zip((4, 3, 2, 1), WIDTHS, strict=True):
        hidden, block = int(c * expand), f"decoder.mscb{level}.0"
        conv(f"{block}.pconv1.0", hidden, c, bias=False), norm(f"{block}.pconv1.1", hidden)
        for i, k in enumerate(kernels):
            conv(f"{block}.msdc.dwconvs.{i}.0", hidden, 1, k, bias=False), norm(f"{block}.msdc.dwconvs.{i}.1", hidden)
        conv(f"{block}.pconv2.0", c, hidden * (1 if add else len(kernels)), bias=False), norm(f"{block}.pconv2.1", c)
        small = c // min(c, 16)
        conv(f"decoder.cab{level}.fc1", small, c, bias=False), conv(f"decoder.cab{level}.fc2", c, small, bias=False)
        conv(f"out_head{level}", classes, c)
    for level, a, b in zip((3, 2, 1), WIDTHS, WIDTHS[1:], strict=False):
        conv(f"decoder.eucb{level}.up_dwc.1", a, 1, 3, bias=False), norm(f"decoder.eucb{level}.up_dwc.2", a), conv(f"decoder.eucb{level}.pwc.0", b, a)
        for name in ("W_g", "W_x"):
            each = b if gate_kernel == 1 else 2
            conv(f"decoder.lgag{level}.{name}.0", b // 2, each, gate_kernel), norm(f"decoder.lgag{level}.{name}.1", b // 2)
        conv(f"decoder.lgag{level}.psi.0", 1, b // 2), norm(f"decoder.lgag{level}.psi.1", 1)
    conv("decoder.sab.conv", 1, 2, 7, bias=False)
    return state


def composed(state, maps, parallel, add, act, kernels):
    """The logits of every level at its own resolution, the finest first; maps from fine to coarse."""

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def norm(name, x):
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x, logits = maps[-1], []
    for level, skip in zip((4, 3, 2, 1), reversed(maps), strict=True):
        if level < 4:
            x = F.relu(norm(f"decoder.eucb{level}.up_dwc.2", conv(f"decoder.eucb{level}.up_dwc.1", F.interpolate(x, scale_factor=2))))
            x = conv(f"decoder.eucb{level}.pwc.0", x)
            gate = F.relu(sum(norm(f"decoder.lgag{level}.{w}.1", conv(f"decoder.lgag{level}.{w}.0", t)) for w, t in (("W_g", x), ("W_x", skip))))
            x = x + skip * norm(f"decoder.lgag{level}.psi.1", conv(f"decoder.lgag{level}.psi.0", gate)).sigmoid()
        pooled = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        x = x * sum(conv(f"decoder.cab{level}.fc2", F.relu(conv(f"decoder.cab{level}.fc1", p))) for p in pooled).sigmoid()
        x = x * conv("decoder.sab.conv", torch.stack([x.mean(1), x.max(1)[0]], 1)).sigmoid()
        block = f"decoder.mscb{level}.0"
        taken, given = act(norm(f"{block}.pconv1.1", conv(f"{block}.pconv1.0", x))), []
        for i in range(len(kernels)):
            given.append(act(norm(f"{block}.msdc.dwconvs.{i}.1", conv(f"{block}.msdc.dwconvs.{i}.0", taken))))
            taken = taken if parallel else taken + given[-1]
        y = torch.stack(given).sum(0) if add else torch.cat(given, 1)
        groups = math.gcd(y.shape[1], x.shape[1])
        y = y[:, torch.arange(y.shape[1]).view(groups, -1).T.flatten()]
        x = x + norm(f"{block}.pconv2.1", conv(f"{block}.pconv2.0", y))
        logits.insert(0, conv(f"out_head{level}", x))
    return logits


@pytest.mark.parametrize(
    ("parallel", "add", "act", "gate_kernel", "kernels", "expand"),
    [
        (True, True, "relu", 3, (1, 3, 5), 2),
        (False, True, "hswish", 3, (1, 3, 5), 2),
        (True, False, "relu", 1, (3, 5), 6),
        (False, False, "relu", 5, (1, 3), 2),
    ],
)
def test_the_decoder_is_upstreams(parallel, add, act, gate_kernel, kernels, expand):
    state = drawn(expand, kernels, add, gate_kernel)
    encoder = SimpleNamespace(output_channels=WIDTHS[::-1], strides=[(4, 4), (2, 2), (2, 2), (2, 2)])
    options = {"parallel": parallel, "add": add, "act": ACTS[act][0], "gate_kernel": gate_kernel, "kernels": kernels, "expand": expand}
    decoder = EMCADDecoder(encoder, 3, 2, True, **options)
    decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in MAP(state).items()})
    maps = [torch.randn(2, c, 8 * 2**i, 8 * 2**i) for i, c in enumerate(WIDTHS)][::-1]
    expected = composed(state, maps, parallel, add, ACTS[act][1], kernels)
    with torch.no_grad():
        decoder.eval()
        for ours, theirs in zip(decoder(maps), expected, strict=True):
            enlarged = F.interpolate(theirs, scale_factor=4, mode="bilinear")
            assert (ours - enlarged).abs().max() <= 1e-5 * enlarged.abs().max()
