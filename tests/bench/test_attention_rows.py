"""The rows of the linear-time mixers: every peer computes what our op does."""

import pytest
import torch

from medssm.bench import attention, attention_peers, measure, onnxruntime_peer, peers

MAKE = {
    "linear-attention": lambda: attention._linear(130, 2, 6, compiled=False),
    "linear-attention-causal": lambda: attention._causal(130, 2, 6, compiled=False),
    "gla": lambda: attention._gated(130, 2, 6, compiled=False),
    "gla-keys": lambda: attention._gated(130, 2, 6, per_key=True, compiled=False),
    "delta": lambda: attention._delta(130, 2, 6, compiled=False),
    "linear-attention-sums": lambda: attention._plain(130, 2, 6, compiled=False),
    "gated-delta": lambda: attention._gated_delta(130, 2, 6),
    "kda": lambda: attention._gated_delta(130, 2, 6, rule="kda"),
    "gdn2": lambda: attention._gated_delta(130, 2, 6, rule="gdn2"),
    "ssd": lambda: attention._ssd(130, 2, 6, 5, compiled=False),
    "ssd3": lambda: attention._ssd3(130, 2, 6, 8, compiled=False),
    "wkv": lambda: attention._wkv(130, 7),
}


ONNXRUNTIME = {onnxruntime_peer.NAME, onnxruntime_peer.WITH_PYTORCH}
OTHERS = {*ONNXRUNTIME, attention.GATED}  # not in the layout of PyTorch's peers, or another op


@pytest.mark.parametrize("row", MAKE)
def test_a_peer_computes_the_same(row):
    sides = MAKE[row]()
    ours = sides.pop("medssm")()
    for name, side in sides.items():
        if name not in OTHERS:
            heads_first = row != "wkv" and name != "eager PyTorch"
            torch.testing.assert_close(side().transpose(1, 2) if heads_first else side(), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "threads"), [("gla", 2), *((row, 1) for row in ("linear-attention-sums", "gla", "gla-keys", "delta", "gated-delta", "kda", "ssd"))]
)
def test_onnxruntime_computes_the_same_on_as_many_threads(row, threads, monkeypatch):
    if not onnxruntime_peer.installed():
        pytest.skip("onnxruntime with LinearAttention is not installed")
    sides, sessions, make = MAKE[row](), [], onnxruntime_peer._session
    monkeypatch.setattr(onnxruntime_peer, "_session", lambda *given: sessions.append(make(*given)) or sessions[-1])
    (name,) = ONNXRUNTIME & sides.keys()
    before = torch.get_num_threads()
    try:
        measure.times({name: sides[name]}, 0, threads)
        torch.testing.assert_close(sides[name](), sides["medssm"](), rtol=1e-3, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert {session.get_session_options().intra_op_num_threads for session in sessions} == {threads}


def test_a_peer_that_computes_something_else_is_refused():
    tensors = attention._heads(130, 2, 6)
    turned = lambda q, k, v: attention_peers.plain_linear_attention(q, k, v).flip(-1)  # noqa: E731
    onnxruntime_peer.check(attention_peers.plain_linear_attention, attention_peers.plain_linear_attention, tensors)
    with pytest.raises(ValueError, match="expected our output to 1e-3"):
        onnxruntime_peer.check(attention_peers.plain_linear_attention, turned, tensors)


def test_without_onnxruntime_its_sides_are_missing(monkeypatch):
    monkeypatch.setattr(onnxruntime_peer, "installed", lambda: False)
    assert not any(ONNXRUNTIME & make().keys() for make in MAKE.values())
    assert onnxruntime_peer.NAME in peers.absent()


def test_training_rows_have_their_forward_and_no_onnxruntime():
    for make in (attention._delta, attention._gated_delta):
        more = {"compiled": False} if make is attention._delta else {"rule": "gdn2"}
        sides = make(130, 2, 6, grad=True, **more)
        assert attention.FORWARD in sides and not ONNXRUNTIME & sides.keys()
        assert torch.is_tensor(sides[attention.FORWARD]()) and all(gradient.abs().sum() > 0 for gradient in sides["medssm"]())


def test_every_kind_has_both_passes():
    assert {name.removesuffix("-train") for name in attention.ROWS} == {*MAKE, "mamba2"}
    assert all(f"{name}-train" in attention.ROWS for name in MAKE)


def test_a_chunked_peer_takes_any_length():
    q = torch.randn(1, 2, 5, 3)
    assert attention_peers.delta_rule(q, q, q, q[..., 0]).shape == q.shape
