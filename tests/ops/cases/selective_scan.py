"""What the contract suite draws of selective_scan."""

from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation, rates, steps


@st.composite
def calls(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 3] if small else [1, 5, 8, 17]))
    channels, state = groups * per, draw(st.sampled_from([1, 3] if small else [1, 2, 8, 16, 19, 40]))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 6), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 7, 64, 65, 150])),)
    )
    seed = draw(st.integers(0, 1000))
    rank = draw(st.sampled_from([None, 1, 3]))
    grouped = groups > 1 or draw(st.booleans())
    bc = (batch, *spatial, groups, state) if grouped else (batch, *spatial, state)
    tensors = {
        "u": normal((batch, *spatial, channels), seed),
        "delta": steps((batch, *spatial, channels if rank is None else rank), seed + 1, rank is None and draw(st.booleans())),
        "A": rates((channels, state), seed),
        "B": normal(bc, seed + 2),
        "C": normal(bc, seed + 3),
    }
    optional = {"D": (channels,), "z": (batch, *spatial, channels), "delta_bias": (channels,), "initial_state": (batch, channels, state)}
    for i, (name, shape) in enumerate(optional.items()):
        if draw(st.booleans()):
            tensors[name] = normal(shape, seed + 4 + i)
    if rank is not None:
        tensors["delta_proj"] = normal((channels, rank), seed + 9, 0.5)
    softplus = draw(st.booleans())
    if not softplus:
        tensors["delta"] = tensors["delta"].abs() * 0.3
        if rank is not None:
            tensors["delta_proj"] = tensors["delta_proj"].abs()
        if "delta_bias" in tensors:
            tensors["delta_bias"] = tensors["delta_bias"].abs()
    options = {"delta_softplus": softplus, "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("selective_scan", tensors, options)


def far(n):
    return {"delta": n(1, 3, 4).abs(), "A": -n(4, 2).abs(), "B": n(1, 3, 1, 2), "C": n(1, 3, 1, 2)}, {}
