"""The CPU kernel of the delta rule against its reference: every instruction set; borders of blocks, tiles, chunks, lanes and segments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medssm.kernels.delta_rule import native, reference

BLOCK, TILE, CHUNK = 4, 64, 256  # steps: of a sweep, of a tile of the walk, and between the points where the gradient of g begins anew


def inputs(batch, length, heads, dk, dv, gated=True, dtype=torch.float64, decay=1.0):
    generator = torch.Generator().manual_seed(length * 31 + dk)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length, heads)
    k, beta = functional.normalize(draw(*tokens, dk), dim=-1), torch.sigmoid(draw(*tokens))
    tensors = draw(*tokens, dk), k, draw(*tokens, dv), beta, -decay * draw(*tokens).abs() if gated else None, draw(batch, heads, dk, dv)
    return [None if t is None else t.to(dtype) for t in tensors]


def check(tensors, index=None, starts=None, reverse=False, tolerance=1e-11, last=True):
    """Outputs and all gradients equal the float64 reference's."""
    *tokens, initial = tensors
    walk, dout = (index, starts, reverse, initial), torch.linspace(-1, 1, tokens[2].numel(), dtype=tokens[2].dtype).view_as(tokens[2]).cos()
    dstate = torch.randn(initial.shape, generator=torch.Generator().manual_seed(0), dtype=initial.dtype) if last else None
    out, state, recalled = native.forward(*tokens, 0.5, *walk, True, True)
    gradients = native.backward(dout, dstate, recalled, *tokens, 0.5, *walk)
    got = [out, state, *gradients[:5], gradients[8]]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = reference.delta_rule(*leaves[:5], 0.5, index, starts, reverse, leaves[5])
    given = [t for t in leaves if t is not None]
    cotangents = [dout.double(), torch.zeros_like(want[1]) if dstate is None else dstate.double()]
    gradients = iter(torch.autograd.grad(want, given, cotangents, allow_unused=True, materialize_grads=True))
    want = [*want, *(None if t is None else next(gradients) for t in leaves)]
    for name, g, w in zip(("out", "state", "dq", "dk", "dv", "dbeta", "dg", "dinitial"), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None and g.numel():
            error = (g.double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [*range(1, 2 * BLOCK + 2), TILE - 1, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_equals_the_reference_at_every_length(isa, length, gated):
    check(inputs(1, length, 2, 3, 5, gated), last=length % 2 == 0)


@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 15), (15, 16), (17, 7), (8, 31), (32, 32), (33, 33), (5, 48), (48, 5), (64, 65), (100, 3)])
def test_equals_the_reference_at_every_width(isa, dk, dv):
    check(inputs(2, 11, 3, dk, dv))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "starts",
    [
        [0, 1, 2, 3, 4],
        [0, 5],
        [2],
        [TILE],
        [TILE - 1, TILE + 1],
        [CHUNK - 1],
        [CHUNK],
        [CHUNK + 1, CHUNK + 2],
        [2 * CHUNK - 1],
        [*range(0, 2 * CHUNK, 7)],
    ],
)
def test_the_state_begins_anew_at_every_start(starts, reverse):
    length = 2 * CHUNK
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    check(inputs(1, length, 1, 4, 5), index, torch.tensor(starts), reverse)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_storage_types(isa, dtype, tolerance):
    check(inputs(2, 37, 2, 19, 21, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("decay", [0.001, *(pytest.param(decay, marks=pytest.mark.thorough) for decay in (0.1, 3.0)), 30.0])
def test_the_gradient_of_the_decay_keeps_its_digits(decay):
    """Over a long walk in float32, and where it is far smaller than what it is the difference of."""
    check(inputs(1, 3000, 1, 8, 8, dtype=torch.float32, decay=decay), tolerance=1e-5)


def gradient_of_g(tensors, dout, dstate):
    """dg in the tensors' type."""
    *tokens, initial = tensors
    walk = (None, None, False, initial)
    _, _, recalled = native.forward(*tokens, 0.5, *walk, True, True)
    return native.backward(dout, dstate, recalled, *tokens, 0.5, *walk)[4]


def test_a_decay_of_nothing_has_no_gradient():
    """One token and no initial state: nothing decays, whatever the gradient of the final state is."""
    q, k, v, beta, g, _ = inputs(1, 1, 2, 64, 64, dtype=torch.float32)
    dstate = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    for decay in (0.0, -0.1, -50.0):
        assert not gradient_of_g([q, k, v, beta, torch.full_like(g, decay), None], torch.zeros_like(v), dstate).any()


@pytest.mark.parametrize("initial", [False, True])
def test_the_gradient_of_a_strong_decay_is_as_small_as_it_should_be(initial):
    """Next to a final state and its gradient that are far larger."""
    tensors = inputs(1, 4096, 1, 64, 64, dtype=torch.float32)
    dout, dstate = torch.zeros_like(tensors[2]), torch.full((1, 1, 64, 64), 10.0)
    if not initial:
        tensors[5] = None
    for decay in (-5.0, -12.0, -18.0):
        tensors[4] = torch.full_like(tensors[4], decay)
        got = gradient_of_g(tensors, dout, dstate)
        want = gradient_of_g([None if t is None else t.double() for t in tensors], dout.double(), dstate.double())
        last = want[:, -1].abs().max()
        assert last > 0 and (got - want).abs().max() < 1e-5 * last
        assert (got - want)[:, :-1].abs().max() < 1e-5 * want[:, :-1].abs().max()
    tensors[4] = torch.full_like(tensors[4], -50.0)  # e^-50 is 2e-22
    assert gradient_of_g(tensors, dout, dstate).abs().sum() < 1e-15


def test_one_strong_decay_among_weak_ones():
    """What it separates has no part in its gradient, and the gradients of those behind it do not suffer."""
    tensors = inputs(1, 200, 1, 16, 16, dtype=torch.float32, decay=0.01)
    tensors[4][:, 100] = -50.0
    got = gradient_of_g(tensors, tensors[2], tensors[5])
    want = gradient_of_g([t.double() for t in tensors], tensors[2].double(), tensors[5].double())
    assert got[:, 100].abs().max() < 1e-15 and (got - want).abs().max() < 1e-5 * want.abs().max()


def test_any_number_of_threads_gives_the_same_bits():
    tensors = inputs(2, 400, 2, 40, 40, dtype=torch.float32)
    *tokens, initial = tensors
    walk = (None, None, False, initial)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, state, recalled = native.forward(*tokens, 0.5, *walk, True, True)
        results.append([out, state, recalled, *native.backward(out, state, recalled, *tokens, 0.5, *walk)])
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- the general form ---------------------------------------------------------------------------------------------------------------

EVERYTHING = {"g": "key", "erase": True, "erase_out": True, "write": "value", "erase_first": False}
FORMS = {
    "KDA": {"g": "key"},
    "gated DeltaNet-2": {"g": "key", "erase": True, "write": "value"},
    "Comba": {"g": "head", "erase": True},
    "RWKV-7": {"g": "key", "erase": True, "erase_out": True, "erase_first": True},
    "everything": EVERYTHING,
    "no decay": {"erase_out": True, "write": "head"},
}
forms = pytest.mark.parametrize("form", FORMS)


def general(form, length, dk=5, dv=7, batch=1, heads=2, dtype=torch.float64, decay=1.0):
    """The arguments of a kernel, by name."""
    q, k, v, beta, g, initial = inputs(batch, length, heads, dk, dv, form.get("g") == "head", decay=decay)
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length, heads)
    made = {
        "q": q,
        "k": k,
        "v": v,
        "beta": beta,
        "g": -decay * draw(*tokens, dk).abs() if form.get("g") == "key" else g,
        "erase": 0.5 * functional.normalize(draw(*tokens, dk), dim=-1) if form.get("erase") else None,
        "erase_out": functional.normalize(draw(*tokens, dk), dim=-1) if form.get("erase_out") else None,
        "write": draw(*tokens, *([dv] if form["write"] == "value" else [])).sigmoid() if form.get("write") else None,
        "initial_state": initial,
    }
    return {name: None if t is None else t.to(dtype) for name, t in made.items()}


def check_general(tensors, first, tolerance=1e-11, **walk):
    """Outputs and all gradients equal the float64 reference's."""
    options = {"scale": 0.5, "erase_first": first, **{"index": None, "starts": None, "reverse": False, **walk}}
    v, initial = tensors["v"], tensors["initial_state"]
    dout = torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v).cos()
    dstate = torch.randn(initial.shape, generator=torch.Generator().manual_seed(0), dtype=initial.dtype)
    out, state, recalled = native.forward(**tensors, **options, save=True, final=True)
    got = {"out": out, "state": state, **dict(zip(tensors, native.backward(dout, dstate, recalled, **tensors, **options), strict=True))}
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items() if t is not None}
    outputs = reference.delta_rule(**leaves, **options)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [dout.double(), dstate.double()], allow_unused=True, materialize_grads=True)
    want = {"out": outputs[0], "state": outputs[1], **dict(zip(leaves, gradients, strict=True))}
    for name, g in got.items():
        assert (g is None) == (name not in want), name
        if g is not None:
            error = (g.double() - want[name]).detach().abs().max() / want[name].detach().abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@forms
@pytest.mark.parametrize("length", [1, 3, 5, TILE + 1])
def test_the_general_form_equals_the_reference_at_every_length(isa, length, form):
    check_general(general(FORMS[form], length), FORMS[form].get("erase_first", False))


@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 15), (17, 7), (8, 31), (33, 33), (5, 48), (65, 34)])
@pytest.mark.parametrize("form", ["everything", "gated DeltaNet-2"])
def test_the_general_form_equals_the_reference_at_every_width(isa, dk, dv, form):
    check_general(general(FORMS[form], 11, dk, dv, batch=2, heads=3), False)


@forms
@pytest.mark.parametrize("reverse", [False, True])
def test_the_state_of_the_general_form_begins_anew_at_every_start(form, reverse):
    length = CHUNK + 20
    index, starts = torch.randperm(length, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, TILE, CHUNK - 1, CHUNK, CHUNK + 7])
    check_general(general(FORMS[form], length, 4), FORMS[form].get("erase_first", False), index=index, starts=starts, reverse=reverse)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_storage_types_of_the_general_form(isa, dtype, tolerance):
    check_general(general(EVERYTHING, 37, 19, 21, dtype=dtype), False, tolerance)


@pytest.mark.parametrize("decay", [0.001, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("form", ["KDA", "RWKV-7"])
def test_the_gradient_of_decays_per_key_keeps_its_digits(form, decay):
    check_general(general(FORMS[form], 600, 8, 8, heads=1, dtype=torch.float32, decay=decay), FORMS[form].get("erase_first", False), 1e-5)


@pytest.mark.parametrize("form", ["KDA", "Comba", "RWKV-7"])
def test_a_strong_decay_of_the_general_form_has_no_gradient(form):
    """No NaN from exp(-inf), and 0 where nothing is left."""
    tensors = general(FORMS[form], 20, 8, 8, dtype=torch.float32)
    tensors["g"][:, 10] = -torch.inf
    options = {"scale": 0.5, "erase_first": FORMS[form].get("erase_first", False), "index": None, "starts": None, "reverse": False}
    out, state, recalled = native.forward(**tensors, **options, save=True, final=True)
    gradients = native.backward(out, state, recalled, **tensors, **options)
    assert all(torch.isfinite(t).all() for t in (out, state, *gradients) if t is not None)
    assert not gradients[4][:, 10].any()


def test_the_general_form_gives_the_same_bits_for_any_number_of_threads():
    tensors = general(EVERYTHING, 400, 40, 40, batch=2, dtype=torch.float32)
    options = {"scale": 0.5, "erase_first": False, "index": None, "starts": None, "reverse": False}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, state, recalled = native.forward(**tensors, **options, save=True, final=True)
        results.append([out, state, *native.backward(out, state, recalled, **tensors, **options)])
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
