"""What the contract suite draws of selective_scan_nd."""

from hypothesis import strategies as st

from medssm import orders
from tests.ops.calls import Call, any_order, normal, rates


@st.composite
def calls(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2] if small else [1, 9, 16]))
    channels, state, k = groups * per, draw(st.sampled_from([1, 2] if small else [1, 8, 16])), draw(st.integers(1, 2 if small else 4))
    spatial = draw(st.lists(st.integers(1, 2 if small else 5), min_size=1, max_size=3).map(tuple))
    seed, rank = draw(st.integers(0, 1000)), draw(st.sampled_from([None, 2]))
    grouped = groups > 1 or draw(st.booleans())
    bc = (batch, *spatial, k, groups, state) if grouped else (batch, *spatial, k, state)
    shared = draw(st.booleans())
    tensors = {
        "x": normal((batch, *spatial, channels) if shared else (batch, *spatial, k, channels), seed),
        "delta": normal((batch, *spatial, k, channels if rank is None else rank), seed + 1),
        "A": rates((k, channels, state), seed),
        "B": normal(bc, seed + 2),
        "C": normal(bc, seed + 3),
    }
    for i, (name, shape) in enumerate({"D": (k, channels), "z": (batch, *spatial, channels), "delta_bias": (k, channels)}.items()):
        if draw(st.booleans()):
            tensors[name] = normal(shape, seed + 4 + i)
    if rank is not None:
        tensors["delta_proj"] = normal((k, channels, rank), seed + 9, 0.5)
    options = {
        "delta_softplus": True,
        "merge": draw(st.sampled_from(["sum", "mean", "stack"])),
        "orders": [draw(any_order(len(spatial))) for _ in range(k)],
    }
    return Call("selective_scan_nd", tensors, options)


def far(n):
    return {"delta": n(1, 3, 1, 4).abs(), "A": -n(1, 4, 2).abs(), "B": n(1, 3, 1, 2), "C": n(1, 3, 1, 2)}, {"orders": [orders.raster()]}
