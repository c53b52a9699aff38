"""The rows of the linear-time mixers: every peer computes what our op does."""

import pytest
import torch

from medssm.bench import attention, attention_peers

MAKE = {
    "linear-attention": lambda: attention._linear(130, 2, 6, compiled=False),
    "linear-attention-causal": lambda: attention._causal(130, 2, 6, compiled=False),
    "gla": lambda: attention._gated(130, 2, 6, compiled=False),
    "gla-keys": lambda: attention._gated(130, 2, 6, per_key=True, compiled=False),
    "delta": lambda: attention._delta(130, 2, 6, compiled=False),
    "ssd": lambda: attention._ssd(130, 2, 6, 5, compiled=False),
    "ssd3": lambda: attention._ssd3(130, 2, 6, 8, compiled=False),
    "wkv": lambda: attention._wkv(130, 7),
}


@pytest.mark.parametrize("row", MAKE)
def test_a_peer_computes_the_same(row):
    sides = MAKE[row]()
    ours = sides.pop("medssm")()
    for name, side in sides.items():
        heads_first = row != "wkv" and name != "eager PyTorch"
        torch.testing.assert_close(side().transpose(1, 2) if heads_first else side(), ours, rtol=1e-3, atol=1e-4)


def test_every_kind_has_both_passes():
    assert {name.removesuffix("-train") for name in attention.ROWS} == {*MAKE, "mamba2"}
    assert all(f"{name}-train" in attention.ROWS for name in MAKE)


def test_a_chunked_peer_takes_any_length():
    q = torch.randn(1, 2, 5, 3)
    assert attention_peers.delta_rule(q, q, q, q[..., 0]).shape == q.shape
