"""Packed sequences on the CPU: each gives what it gives alone, on every instruction set, in every storage type, at every border of the kernels."""

from __future__ import annotations

import importlib
import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional

from medssm.kernels.walks import Sequences

# Empty ones first, last and in between; ends on and beside those of tiles (32 and 64 steps), tasks (128), chunks (256) and segments (512).
BOUNDS = [0, 0, 1, 4, 64, 129, 129, 256, 300, 511, 1100, 1100]
STARTS = [2, 70, 128, 300, 512, 700, 1024]  # of segments that no sequence begins with


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def selective_scan(length, count, state=17, channels=37, rank=3):
    tokens = {"u": draw(1, length, channels), "delta": draw(1, length, rank), "B": draw(1, length, 1, state), "C": draw(1, length, 1, state, seed=1)}
    weights = {"A": -4 * draw(channels, state).abs(), "D": draw(channels), "delta_bias": draw(channels, seed=1), "delta_proj": draw(channels, rank)}
    return tokens | {"z": draw(1, length, channels, seed=1)}, weights, {"initial_state": draw(count, channels, state)}, {"delta_softplus": True}


def causal_conv1d(length, count, channels=37, width=4):
    weights = {"weight": draw(channels, width), "bias": draw(channels)}
    return {"x": draw(1, length, channels)}, weights, {"initial_state": draw(count, channels, width - 1)}, {"activation": "silu"}


def linear_attention(length, count, groups=2, dk=6, dv=19, normalize=True):
    tokens = {"q": draw(1, length, 2 * groups, dk), "k": draw(1, length, groups, dk), "v": draw(1, length, groups, dv)}
    states = {"initial_kv": draw(count, groups, dk, dv), "initial_k": draw(count, groups, dk).abs()}
    return tokens, {}, states, {"cos": None, "sin": None, "feature_map": "elu", "causal": True, "normalize": normalize, "scale": 0.7, "eps": 0.5}


def heads(length, count, dk, dv, heads=2):
    tokens = {"q": draw(1, length, heads, dk), "k": functional.normalize(draw(1, length, heads, dk, seed=1), dim=-1), "v": draw(1, length, heads, dv)}
    return tokens, {"initial_state": draw(count, heads, dk, dv)}


def decay_per_head(length, count):
    tokens, states = heads(length, count, 18, 21)
    return tokens | {"g": -0.3 * draw(1, length, 2).abs()}, {}, states, {"scale": 0.7}


def decay_per_key(length, count):
    tokens, states = heads(length, count, 18, 21)
    return tokens | {"g": -0.3 * draw(1, length, 2, 18).abs()}, {}, states, {"scale": 0.7}


def delta_rule(length, count):
    tokens, states = heads(length, count, 18, 21)
    return tokens | {"beta": draw(1, length, 2).sigmoid(), "g": -0.3 * draw(1, length, 2, seed=1).abs()}, {}, states, {"scale": 0.5}


def delta_rule_general(length, count, first=False):
    tokens, states = heads(length, count, 18, 21)
    tokens |= {
        "beta": draw(1, length, 2).sigmoid(),
        "g": -0.3 * draw(1, length, 2, 18, seed=3).abs(),
        "write": draw(1, length, 2, 21, seed=4).sigmoid(),
    }
    tokens |= {name: functional.normalize(draw(1, length, 2, 18, seed=seed), dim=-1) / 2 for name, seed in (("erase", 5), ("erase_out", 6))}
    return tokens, {}, states, {"scale": 0.5, "erase_first": first}


def ssd(length, count, heads=4, size=18, groups=2, state=21):
    tokens = {"x": draw(1, length, heads, size), "dt": draw(1, length, heads) - 2, "z": draw(1, length, heads, size, seed=1)}
    tokens |= {"B": draw(1, length, groups, state), "C": draw(1, length, groups, state, seed=1)}
    weights = {"A": -draw(heads).abs(), "D": draw(heads, size), "dt_bias": draw(heads, seed=1)}
    return tokens, weights, {"initial_state": draw(count, heads, size, state)}, {"dt_softplus": True, "low": 0.0, "high": float("inf")}


CASES = {
    "selective_scan": ("selective_scan", selective_scan),
    "causal_conv1d": ("causal_conv1d", causal_conv1d),
    "linear_attention": ("linear_attention", linear_attention),
    "linear_attention, not normalized": ("linear_attention", partial(linear_attention, normalize=False)),
    "decay per head": ("gated_linear_attention", decay_per_head),
    "decay per key": ("gated_linear_attention", decay_per_key),
    "delta_rule": ("delta_rule", delta_rule),
    "delta_rule, general": ("delta_rule", delta_rule_general),
    "delta_rule, erase first": ("delta_rule", partial(delta_rule_general, first=True)),
    "ssd": ("ssd", ssd),
}
# Of each op: what forward may be told, what it keeps for backward, the tokens that are shaped like the output, the tensors in the order of gradients.
OPS = {
    "selective_scan": ("save final", "checkpoints", "u", "u delta A B C D z delta_bias delta_proj initial_state"),
    "causal_conv1d": ("final", "", "x", "x weight bias initial_state"),
    "linear_attention": ("", "kv z", "v", "q k v initial_kv initial_k"),
    "gated_linear_attention": ("final", "", "v", "q k v g initial_state"),
    "delta_rule": ("save final", "recalled", "v", "q k v beta g erase erase_out write initial_state"),
    "ssd": ("save final", "y", "x", "x dt A B C D z dt_bias initial_state"),
}
every = pytest.mark.parametrize("case", CASES)


class Packed:
    """One of the cases, its tensors in `dtype`; with_states: initial states are given, and the final ones differentiated."""

    def __init__(self, case, bounds=BOUNDS, starts=(), index=None, reverse=False, dtype=torch.float64, with_states=True):
        self.op, make = CASES[case]
        self.kernel = importlib.import_module(f"medssm.kernels.{self.op}.native")
        self.flags, self.kept, (like,), self.order = (names.split() for names in OPS[self.op])
        length, count = bounds[-1], len(bounds) - 1
        tokens, weights, states, self.options = make(length, count)
        of_states = dtype if self.op == "causal_conv1d" or dtype is torch.float64 else torch.float32
        self.tokens, self.weights = ({name: t.to(dtype) for name, t in tensors.items()} for tensors in (tokens, weights))
        self.states = {name: t.to(of_states) if with_states else None for name, t in states.items()}
        self.index, self.reverse, self.bounds = index, reverse, bounds
        self.starts = sorted({*starts, *bounds} - {length})
        shape = list(self.tokens[like].shape)
        if "q" in self.tokens:
            shape[2] = self.tokens["q"].shape[2]
        self.dout = draw(*shape, seed=5).to(dtype)
        self.dstates = [draw(*t.shape, seed=5).to(of_states) if with_states else None for t in states.values()]

    def run(self):
        """All in one call."""
        of_segments = torch.tensor([next(i for i, end in enumerate(self.bounds[1:]) if start < end) for start in self.starts])
        walk = {"index": self.index, "starts": torch.tensor(self.starts), "reverse": self.reverse}
        sequences = Sequences(len(self.bounds) - 1, of_segments)
        return self._call({**self.tokens, **self.weights, **self.states}, walk | {"sequences": sequences}, self.dout, self.dstates)

    def apart(self):
        """One call for each sequence, in float64: what tokens have in their places, what states have in their rows, gradients of weights added."""
        length = self.bounds[-1]
        order = torch.arange(length) if self.index is None else self.index
        results = []
        for i, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            mine = order[begin:end]
            tensors = {name: t[:, mine].double() for name, t in self.tokens.items()} | {name: t.double() for name, t in self.weights.items()}
            tensors |= {name: None if t is None else t[i : i + 1].double() for name, t in self.states.items()}
            starts = [s - begin for s in self.starts if begin <= s < end]
            walk = {"index": None, "starts": torch.tensor(starts or [0]), "reverse": self.reverse}
            dstates = [None if t is None else t[i : i + 1].double() for t in self.dstates]
            results.append(self._call(tensors, walk, self.dout[:, mine].double(), dstates))
        back = torch.argsort(order)
        joined = {}
        for name in results[0]:
            parts = [result[name] for result in results]
            if name == "out" or name in self.tokens:
                joined[name] = torch.cat(parts, 1)[:, back]
            else:
                joined[name] = sum(parts) if name in self.weights else torch.cat(parts)
        return joined

    def _call(self, tensors, walk, dout, dstates):
        named = {**tensors, **self.options, **walk}
        found = self.kernel.forward(**named, **dict.fromkeys(self.flags, True))
        saved = dict(zip(self.kept, found[len(found) - len(self.kept) :], strict=True))
        cotangents = dict(zip(["dstate"] if len(dstates) == 1 else ["dkv", "dz"], dstates, strict=True))
        gradients = self.kernel.backward(dout=dout, **cotangents, **saved, **named)
        results = {"out": found[0]} | {f"state {i}": t for i, t in enumerate(found[1 : 1 + len(dstates)])}
        return results | {name: g for name, g in zip(self.order, gradients, strict=True) if g is not None}


def compare(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        error = (got[name].double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


@every
def test_each_sequence_is_on_its_own(isa, case):
    packed = Packed(case)
    compare(packed.run(), packed.apart(), 1e-10)


@every
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_segments_orders_and_states(case, reverse, with_states):
    """A state is a sequence's, and a segment that begins inside of one begins with zeros."""
    index = torch.randperm(BOUNDS[-1], generator=torch.Generator().manual_seed(0))
    packed = Packed(case, BOUNDS, STARTS, index, reverse, with_states=with_states)
    compare(packed.run(), packed.apart(), 1e-10)


@every
def test_every_way_to_pack_five_tokens(case):
    for inner in itertools.chain.from_iterable(itertools.combinations_with_replacement(range(6), count) for count in range(3)):
        for reverse in (False, True):
            packed = Packed(case, [0, *inner, 5], reverse=reverse)
            compare(packed.run(), packed.apart(), 1e-10)


@every
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_storage_types(isa, case, dtype, tolerance):
    packed = Packed(case, [0, 40, 41, 41, 100, 230], dtype=dtype)
    compare(packed.run(), packed.apart(), tolerance)


@every
def test_what_is_no_number_stays_in_its_sequence(case):
    packed = Packed(case, [0, 70, 150, 300], dtype=torch.float32)
    want = packed.run()
    for t in packed.tokens.values():
        t[:, 75] = torch.nan
    packed.dout[:, 140] = torch.nan
    got = packed.run()
    for name in ("out", *packed.tokens):
        assert torch.equal(got[name][:, :70], want[name][:, :70]) and torch.equal(got[name][:, 150:], want[name][:, 150:]), name
    for name in (name for name in want if name.startswith(("state", "initial"))):
        assert torch.equal(got[name][::2], want[name][::2]), name


@every
def test_any_number_of_threads_gives_the_same_bits(case):
    packed, results = Packed(case, [0, 300, 301, 1500, 2000], STARTS, dtype=torch.float32), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(packed.run())
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())
