"""What the contract suite draws of causal_conv1d."""

from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation


@st.composite
def calls(draw, small=False):
    batch, channels, width = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33])), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 2, 9, 70])),)
    )
    seed = draw(st.integers(0, 1000))
    tensors = {"x": normal((batch, *spatial, channels), seed), "weight": normal((channels, width), seed + 1)}
    if draw(st.booleans()):
        tensors["bias"] = normal((channels,), seed + 2)
    if draw(st.booleans()):
        tensors["initial_state"] = normal((batch, channels, width - 1), seed + 3)
    options = {
        "activation": draw(st.sampled_from([None, "silu"])),
        "reverse": draw(st.booleans()),
        "return_final_state": draw(st.booleans()),
        "order": None,
    }
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("causal_conv1d", tensors, options)


def far(n):
    return {"weight": n(4, 3)}, {}
