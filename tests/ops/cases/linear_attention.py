"""What the contract suite draws of linear_attention."""

import torch
from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation

SEQUENCE = {"causal": True, "rotary": None}  # cosines and sines are a token's own: they do not move with it
FAR = (1, 3, 2, 4)


@st.composite
def calls(draw, small=False):
    batch, groups, per_group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
    widths = st.sampled_from([1, 2, 4] if small else [1, 2, 8, 16, 19, 40])
    dk, dv, causal = draw(widths), draw(widths), draw(st.booleans())
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 7, 64, 65, 150])),)
    )
    seed = draw(st.integers(0, 1000))
    tensors = {
        "v": normal((batch, *spatial, groups, dv), seed),
        "q": normal((batch, *spatial, groups * per_group, dk), seed + 1),
        "k": normal((batch, *spatial, groups, dk), seed + 2),
    }
    if draw(st.booleans()):
        tensors["initial_state_0"] = normal((batch, groups, dk, dv), seed + 3)
        tensors["initial_state_1"] = normal((batch, groups, dk), seed + 4).abs()
    feature_map = draw(st.sampled_from(["elu", "relu", None]))
    options = {
        "feature_map": feature_map,
        "causal": causal,
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "reverse": draw(st.booleans()),
        "order": None,
        # a denominator is positive, and where all of relu(k) may be zero not a millionth either, whose inverse no difference quotient meets
        "normalize": feature_map is not None and draw(st.booleans()),
        "eps": 1e-6 if feature_map == "elu" else 0.5,
        "rotary": None,
        "return_final_state": draw(st.booleans()),
    }
    if dk % 2 == 0 and draw(st.booleans()):
        angles = normal((*spatial, groups, dk // 2) if draw(st.booleans()) else (*spatial, dk // 2), seed + 5, 3.0)
        angles = angles.to(torch.float32).repeat_interleave(2, -1)
        options["rotary"] = (angles.cos(), angles.sin())
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("linear_attention", tensors, options)


def far(n):
    return {"q": n(1, 3, 2, 3), "k": n(1, 3, 2, 3)}, {}
