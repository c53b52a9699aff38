"""What the contract suite draws of bi_wkv: in mode "upstream" decays that are small over a chunk, where its denominator is well away from zero;
negative ones that make no exponents of hundreds, whose last place float32's gradients would feel (tests/ops/test_bi_wkv.py has those, and larger)."""

from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation


@st.composite
def calls(draw, small=False):
    batch, channels = draw(st.integers(1, 2)), draw(st.sampled_from([3] if small else [5, 16, 33]))  # the gradient of one w may cancel
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 2, 9, 70, 131])),)
    )
    modes = ["exact"] if small and (kind == "order" or spatial[0] < 5) else ["exact", "upstream"]  # eps is no constant to gradcheck where 0 is due
    mode, seed = draw(st.sampled_from(modes)), draw(st.integers(0, 1000))
    decay = draw(st.sampled_from([0.01, 0.05, 0.3, 3.0] if mode == "exact" else [0.01, 0.03]))
    w = normal((channels,), seed + 2, decay)
    tensors = {
        "v": normal((batch, *spatial, channels), seed),
        "k": normal((batch, *spatial, channels), seed + 1, draw(st.sampled_from([1.0, 10.0] if mode == "exact" else [1.0]))),
        "w": w.abs() if decay > 0.1 else w,
        "u": normal((channels,), seed + 3),
    }
    order = None
    if kind == "index":
        order = permutation(spatial[0], seed)
    elif kind == "order":
        order = draw(any_order(len(spatial)))
    return Call("bi_wkv", tensors, {"mode": mode, "order": order})


def far(n):
    return {"k": n(1, 3, 4), "w": n(4), "u": n(4)}, {}
