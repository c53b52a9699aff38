"""What the contract suite draws of depthwise_conv."""

import math

from hypothesis import strategies as st

from tests.ops.calls import Call, normal


@st.composite
def calls(draw, small=False):
    dims = draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 3 if small else 7), min_size=dims, max_size=dims).map(tuple))
    kernel = draw(st.lists(st.sampled_from([1, 3] if small else [1, 3, 5, 7]), min_size=dims, max_size=dims).map(tuple))
    batch, channels, seed = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33])), draw(st.integers(0, 1000))
    tensors = {"x": normal((batch, *spatial, channels), seed), "weight": normal((channels, *kernel), seed + 1) / math.prod(kernel) ** 0.5}
    if draw(st.booleans()):
        tensors["bias"] = normal((channels,), seed + 2)
    return Call("depthwise_conv", tensors, {"activation": draw(st.sampled_from([None, "silu"]))})


def far(n):
    return {"weight": n(4, 3)}, {}
