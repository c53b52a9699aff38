"""Rows of the other linear-time mixers: linear attention, gated linear attention, the delta rule and its kin, SSD and bidirectional WKV, each against
the PyTorch form that it replaces, that form under torch.compile, and onnxruntime's op where it has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from medssm import ops, orders
from medssm.bench import attention_peers as peers
from medssm.bench import onnxruntime_peer
from medssm.bench.measure import Side
from medssm.bench.row import COMPILED, OURS, Row, call

Peer: TypeAlias = Callable[..., torch.Tensor]
_EAGER, _HEADS_FIRST, _CHUNKED, _LOOP = "eager PyTorch", "eager PyTorch, heads in front", "chunked PyTorch", "loop over tokens in PyTorch"
GATED, FORWARD = "medssm, gated delta rule", "medssm, forward alone"


def _sides(ours: Peer, theirs: Peer, name: str, tensors: dict[str, torch.Tensor], grad: bool, compiled: bool | Peer = True) -> dict[str, Side]:
    """Our op on channel-last tokens, the peer on its own layout, and the peer compiled (or what is given in its place)."""
    mine = {k: t.clone().requires_grad_(grad) for k, t in tensors.items()}
    other = {k: (t.movedim(1, 2).contiguous() if t.dim() > 2 and name != _LOOP else t.clone()).requires_grad_(grad) for k, t in tensors.items()}
    sides = {OURS: call(ours, mine), name: call(theirs, other)}
    return sides | {COMPILED: call(torch.compile(theirs) if compiled is True else compiled, other)} if compiled else sides


def _with_onnxruntime(
    sides: dict[str, Side], ours: Peer, theirs: Peer, tensors: dict[str, torch.Tensor], grad: bool, name: str = onnxruntime_peer.NAME
) -> dict[str, Side]:
    """The sides, and onnxruntime's on the same tensors where it is installed: once its output is ours. It has no backward."""
    if grad or not onnxruntime_peer.installed():
        return sides
    onnxruntime_peer.check(ours, theirs, tensors)
    return sides | {name: call(theirs, tensors)}


def _draw(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _heads(length: int, heads: int, width: int) -> dict[str, torch.Tensor]:
    return _draw(q=(1, length, heads, width), k=(1, length, heads, width), v=(1, length, heads, width))


def _linear(length: int, heads: int, width: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    """Against the form on tokens, as networks have them, and against the form whose heads are already in front of the tokens."""
    tensors = _heads(length, heads, width)
    tokens = {k: t.clone().requires_grad_(grad) for k, t in tensors.items()}
    sides = _sides(partial(ops.linear_attention, backend="native"), peers.linear_attention, _HEADS_FIRST, tensors, grad, compiled=False)
    sides[_EAGER] = call(peers.linear_attention_of_tokens, tokens)
    return sides | {COMPILED: call(torch.compile(peers.linear_attention_of_tokens), tokens)} if compiled else sides


def _causal(length: int, heads: int, width: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    ours = partial(ops.linear_attention, causal=True, backend="native")
    return _sides(ours, peers.causal_linear_attention, _CHUNKED, _heads(length, heads, width), grad, compiled)


def _plain(length: int, heads: int, width: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    """The sums alone: no feature map, no normaliser."""
    tensors, ours = _heads(length, heads, width), partial(ops.linear_attention, causal=True, feature_map=None, normalize=False, backend="native")
    sides = _sides(ours, peers.plain_linear_attention, _CHUNKED, tensors, grad, compiled)
    return _with_onnxruntime(sides, ours, partial(onnxruntime_peer.linear_attention, "linear", scale=1.0), tensors, grad)


def _decays(*shape: int) -> torch.Tensor:
    """Logarithms of decays of 0.95, more or less."""
    return torch.nn.functional.logsigmoid(torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3)


def _gated(length: int, heads: int, width: int, grad: bool = False, per_key: bool = False, compiled: bool = True) -> dict[str, Side]:
    tensors, ours = _heads(length, heads, width), partial(ops.gated_linear_attention, backend="native")
    tensors["g"] = _decays(*tensors["k"].shape[: 4 if per_key else 3])
    sides = _sides(ours, peers.gated_linear_attention, _CHUNKED, tensors, grad, compiled)
    return _with_onnxruntime(sides, ours, partial(onnxruntime_peer.linear_attention, "gated"), tensors, grad)


def _delta_tensors(length: int, heads: int, width: int) -> dict[str, torch.Tensor]:
    tensors = _heads(length, heads, width)
    tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    tensors["beta"] = torch.rand((1, length, heads), generator=torch.Generator().manual_seed(1))
    return tensors


def _delta(length: int, heads: int, width: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    tensors, ours = _delta_tensors(length, heads, width), partial(ops.delta_rule, backend="native")
    # Compiling the loop unrolled over 512 chunks takes more than a quarter of an hour, so one chunk is compiled, not the whole.
    whole = partial(peers.delta_rule, step=torch.compile(peers.delta_step))
    sides = _sides(ours, peers.delta_rule, _CHUNKED, tensors, grad, compiled and whole) | ({FORWARD: call(ours, tensors)} if grad else {})
    return _with_onnxruntime(sides, ours, partial(onnxruntime_peer.linear_attention, "delta"), tensors, grad)


def _gated_delta(length: int, heads: int, width: int, grad: bool = False, rule: str = "gated") -> dict[str, Side]:
    """The delta rule with decays, "gated", "kda" or "gdn2": beside the first of these and, in training, beside its own forward."""
    tensors = _delta_tensors(length, heads, width)
    gated = tensors | {"g": _decays(1, length, heads)}
    ours = partial(ops.delta_rule, backend="native")
    given = dict(gated)
    if rule != "gated":
        given["g"] = _decays(*tensors["k"].shape)
    if rule == "gdn2":
        ours = partial(ours, beta=given.pop("beta"))  # which the two gates replace
        gates = torch.rand((2, *tensors["k"].shape), generator=torch.Generator().manual_seed(2))
        given |= {"erase": gates[0] * tensors["k"], "write": gates[1]}

    def leaves(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: t.clone().requires_grad_(grad) for k, t in of.items()}

    sides = {OURS: call(ours, leaves(given))}
    if rule != "gated":
        sides[GATED] = call(partial(ops.delta_rule, backend="native"), leaves(gated))
    if grad:
        sides[FORWARD] = call(ours, given)
    if rule == "gdn2":
        return sides
    return _with_onnxruntime(sides, ours, partial(onnxruntime_peer.linear_attention, "gated_delta"), given, grad)


def _ssd(length: int, heads: int, width: int, state: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    tensors = _draw(
        x=(1, length, heads, width),
        dt=(1, length, heads),
        A=(heads,),
        B=(1, length, 1, state),
        C=(1, length, 1, state),
        D=(heads,),
        z=(1, length, heads, width),
        dt_bias=(heads,),
    )
    tensors["A"] = -torch.linspace(1, 16, heads)
    tensors["dt_bias"] -= 4
    ours = partial(ops.ssd, dt_softplus=True, backend="native")
    sides = _sides(ours, peers.ssd, _CHUNKED, tensors, grad, compiled)
    return _with_onnxruntime(sides, ours, onnxruntime_peer.ssd, tensors, grad, onnxruntime_peer.WITH_PYTORCH)


def _ssd3(length: int, heads: int, width: int, state: int, grad: bool = False, compiled: bool = True) -> dict[str, Side]:
    """Of one rank, half of the channels turning."""
    tokens, rows = (1, length, heads), (1, length, 1, state)
    tensors = _draw(
        x=(*tokens, width), dt=tokens, A=tokens, B=rows, C=rows, trap=tokens, angles=(*tokens, state // 4), D=(heads,), z=(*tokens, width)
    )
    tensors |= _draw(B_bias=(heads, state), C_bias=(heads, state))
    tensors["dt"], tensors["A"] = torch.nn.functional.softplus(tensors["dt"] - 4), -1 - tensors["A"].abs()
    return _sides(partial(ops.ssd3, backend="native"), peers.ssd3, _CHUNKED, tensors, grad, compiled)


def _wkv(length: int, channels: int, grad: bool = False) -> dict[str, Side]:
    tensors = _draw(w=(channels,), u=(channels,), k=(1, length, channels), v=(1, length, channels))
    tensors["w"], tensors["u"] = tensors["w"] / length, tensors["u"] / length
    return _sides(partial(ops.bi_wkv, backend="native"), peers.bi_wkv, _LOOP, tensors, grad, compiled=False)


def _mamba2(length: int, channels: int) -> dict[str, Side]:
    """Inference of the whole mixer, against the slow path of transformers, which runs where mamba_ssm is not installed."""
    from medssm.nn import Mamba2

    torch.manual_seed(0)
    x = torch.randn(1, length, channels)
    ours = Mamba2(channels, d_state=64, headdim=64, orders=[orders.raster()]).eval()

    def run(module: torch.nn.Module) -> Side:
        def forward() -> torch.Tensor:
            with torch.no_grad():
                return module(x)

        return forward

    sides = {OURS: run(ours)}
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    except ImportError:
        return sides
    config = Mamba2Config(hidden_size=channels, num_heads=2 * channels // 64, head_dim=64, state_size=64, n_groups=1, expand=2, chunk_size=64)
    return sides | {"transformers' Mamba-2, slow path": run(Mamba2Mixer(config, 0).eval())}


def _rows() -> dict[str, Row]:
    rows = {}
    kinds: dict[str, tuple[str, Callable[..., dict[str, Side]], int, int, dict[str, Any]]] = {
        "linear-attention": ("linear_attention, non-causal", _linear, 6, 16, {}),
        "linear-attention-causal": ("linear_attention, causal", _causal, 4, 32, {}),
        "linear-attention-sums": ("linear_attention, causal, no feature map, not normalised", _plain, 4, 64, {}),
        "gla": ("gated_linear_attention, decay per head", _gated, 4, 64, {}),
        "gla-keys": ("gated_linear_attention, decay per key", partial(_gated, per_key=True), 4, 64, {}),
        "delta": ("delta_rule", _delta, 4, 64, {}),
        "gated-delta": ("delta_rule with a decay per head", _gated_delta, 4, 64, {}),
        "kda": ("delta_rule as KDA: a decay per key", _gated_delta, 4, 64, {"rule": "kda"}),
        "gdn2": ("delta_rule as gated DeltaNet-2: a decay and an erase gate per key, a write gate per value", _gated_delta, 4, 64, {"rule": "gdn2"}),
        "ssd": ("ssd, state 64", _ssd, 4, 64, {"state": 64}),
        "ssd3": ("ssd3, state 64", _ssd3, 4, 64, {"state": 64}),
    }
    for name, (title, make, heads, width, more) in kinds.items():
        for grad in (False, True):
            what = "forward and backward" if grad else "forward"
            rows[name + "-train" * grad] = Row(
                f"{title}, {heads} heads of {width}, 32,768 tokens, {what}",
                partial(make, 32768, heads, width, grad=grad, **more),
                limit=1.0,
                memory=True,
                tokens=32768 * heads * width,
            )
    rows["wkv"] = Row("bi_wkv, 192 channels, 16,384 tokens, forward", partial(_wkv, 16384, 192), limit=1.0, memory=True, tokens=16384 * 192)
    rows["wkv-train"] = Row(
        "bi_wkv, 192 channels, 16,384 tokens, forward and backward", partial(_wkv, 16384, 192, True), limit=1.0, memory=True, tokens=16384 * 192
    )
    rows["mamba2"] = Row("Mamba-2 mixer, 256 channels, 4,096 tokens, inference", partial(_mamba2, 4096, 256), limit=1.0, tokens=4096 * 256)
    return rows


ROWS = _rows()
QUICK = {
    "linear-attention": Row(
        "linear_attention, non-causal, 2 heads of 8, 256 tokens, forward", partial(_linear, 256, 2, 8, compiled=False), tokens=256 * 2 * 8
    )
}
