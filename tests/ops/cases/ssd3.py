"""What the contract suite draws of ssd3: with one rank (SISO) and with several, whose queries meet every key of their token."""

import torch
from hypothesis import strategies as st

from tests.ops.calls import Call, any_order, normal, permutation

FAR = (1, 3, 1, 4)


@st.composite
def calls(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2]))
    heads, size = groups * per, draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33]))
    angles = draw(st.integers(1, 3))
    state = 2 * angles + draw(st.sampled_from([0, 2] if small else [0, 2, 31]))
    ranks, pairs = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from(["adjacent", "halves"]))
    state += state % 2 if pairs == "halves" else 0
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = (
        draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple))
        if kind == "order"
        else (draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 6, 65])),)
    )
    seed = draw(st.integers(0, 1000))
    tokens = (batch, *spatial)
    rank = (ranks,) if ranks > 1 or draw(st.booleans()) else ()
    tensors = {
        "x": normal((*tokens, heads, size), seed),
        "dt": torch.sigmoid(normal((*tokens, heads), seed + 1) - draw(st.sampled_from([0.0, 3.0]))),
        "A": -normal((*tokens, heads), seed + 2).abs() * draw(st.sampled_from([1.0, 1.0, 10.0])),
        "B": normal((*tokens, *rank, groups, state), seed + 3),
        "C": normal((*tokens, *rank, groups, state), seed + 4),
        "trap": normal((*tokens, heads), seed + 5),
        "angles": normal((*tokens, *([heads] if draw(st.booleans()) else []), angles), seed + 6),
    }
    optional = {"D": (heads,), "z": (*tokens, heads, size), "B_bias": (heads, *rank, state), "C_bias": (heads, *rank, state)}
    if ranks > 1 or draw(st.booleans()):
        optional |= {name: (heads, ranks, size) for name in ("mimo_x", "mimo_o", "mimo_z")}
    for i, (name, shape) in enumerate(optional.items()):
        if draw(st.booleans()) and (name != "mimo_z" or "z" in tensors):
            tensors[name] = normal(shape, seed + 8 + i)
    if draw(st.booleans()):
        shapes = (heads, angles), (heads, size, state), (ranks, heads, state), (heads, size)
        tensors |= {f"initial_state_{i}": normal((batch, *shape), seed + 20 + i) for i, shape in enumerate(shapes)}
    options = {"pairs": pairs, "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("ssd3", tensors, options)


def far(n):
    rest = {"dt": n(1, 3, 1).abs(), "A": -n(1, 3, 1).abs(), "B": n(1, 3, 1, 2), "C": n(1, 3, 1, 2), "trap": n(1, 3, 1), "angles": n(1, 3, 1)}
    return rest, {}
