"""What the contract suite draws of ssd."""

from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation, rates, steps

FAR = (1, 3, 1, 4)


@st.composite
def calls(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2, 3]))
    heads, size = groups * per, draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33]))
    state = draw(st.sampled_from([1, 3] if small else [1, 5, 16, 37]))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 6, 64, 65, 131])),)
    )
    seed = draw(st.integers(0, 1000))
    tokens = (batch, *spatial)
    tensors = {
        "x": normal((*tokens, heads, size), seed),
        "dt": steps((*tokens, heads), seed + 1, draw(st.booleans())),
        "A": rates((heads,), seed) * draw(st.sampled_from([1.0, 1.0, 30.0])),
        "B": normal((*tokens, groups, state), seed + 2),
        "C": normal((*tokens, groups, state), seed + 3),
    }
    optional = {
        "D": draw(st.sampled_from([(heads,), (heads, size)])),
        "z": (*tokens, heads, size),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, size, state),
    }
    for i, (name, shape) in enumerate(optional.items()):
        if draw(st.booleans()):
            tensors[name] = normal(shape, seed + 4 + i)
    options = {"dt_softplus": draw(st.booleans()), "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    if draw(st.booleans()):
        options["dt_limit"] = draw(st.sampled_from([(0.001, 0.1), (0.3, 1.0)]))
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("ssd", tensors, options)


def far(n):
    return {"dt": n(1, 3, 1).abs(), "A": -n(1).abs(), "B": n(1, 3, 1, 2), "C": n(1, 3, 1, 2)}, {}
