"""What the contract suite draws of delta_rule, half of it general: keys of at most unit length and beta in [0, 1], where the recurrence is stable."""

import torch
from hypothesis import strategies as st
from torch.nn import functional

from tests.ops.calls import Call, any_order, normal, permutation

FAR = (1, 3, 1, 4)


@st.composite
def calls(draw, small=False):
    batch, heads = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    dk, dv = draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33])), draw(st.sampled_from([1, 3] if small else [1, 5, 16, 37]))
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
        "k": functional.normalize(normal((*tokens, dk), seed + 1), dim=-1) * draw(st.sampled_from([1.0, 0.5])),
        "v": normal((*tokens, dv), seed + 2),
        "beta": torch.sigmoid(2 * normal(tokens, seed + 3)),
    }
    general = draw(st.booleans())
    if draw(st.booleans()):
        g = normal((*tokens, dk) if general and draw(st.booleans()) else tokens, seed + 4)
        tensors["g"] = -g.abs() * draw(st.sampled_from([0.01, 1.0, 50.0]))
    if general and draw(st.booleans()):
        tensors["erase"] = 0.5 * functional.normalize(normal((*tokens, dk), seed + 6), dim=-1)
        if draw(st.booleans()):
            tensors["erase_out"] = functional.normalize(normal((*tokens, dk), seed + 7), dim=-1)
    if general and draw(st.booleans()):
        tensors["write"] = torch.sigmoid(normal((*tokens, dv) if draw(st.booleans()) else tokens, seed + 8))
    if draw(st.booleans()):
        tensors["initial_state"] = normal((batch, heads, dk, dv), seed + 5)
    options = {"scale": draw(st.sampled_from([None, 0.7])), "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    options["erase_first"] = general and draw(st.booleans())
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("delta_rule", tensors, options)


def far(n):
    return {"q": n(1, 3, 1, 2), "k": functional.normalize(n(1, 3, 1, 2), dim=-1), "beta": torch.sigmoid(n(1, 3, 1))}, {}
