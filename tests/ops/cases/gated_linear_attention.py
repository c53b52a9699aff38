"""What the contract suite draws of gated_linear_attention: decays near one, of any size, and such that forget everything."""

from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation

FAR = (1, 3, 1, 4)


@st.composite
def calls(draw, small=False):
    batch, heads = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    dk, dv = (draw(st.sampled_from([1, 3] if small else [1, 5, 16, 37])) for _ in range(2))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 6, 64, 65, 131])),)
    )
    seed = draw(st.integers(0, 1000))
    tokens = (batch, *spatial, heads)
    tensors = {
        "q": normal((*tokens, dk), seed),
        "k": normal((*tokens, dk), seed + 1),
        "v": normal((*tokens, dv), seed + 2),
        "g": -normal(draw(st.sampled_from([tokens, (*tokens, dk)])), seed + 3).abs() * draw(st.sampled_from([0.01, 1.0, 50.0])),
    }
    if draw(st.booleans()):
        tensors["initial_state"] = normal((batch, heads, dk, dv), seed + 4)
    options = {"scale": draw(st.sampled_from([None, 0.7])), "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("gated_linear_attention", tensors, options)


def far(n):
    return {"q": n(1, 3, 1, 2), "k": n(1, 3, 1, 2), "g": -n(1, 3, 1).abs()}, {}
