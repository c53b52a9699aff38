"""Shapes as ops declare them: what fits, the size of every axis, and what an error says."""

from __future__ import annotations

import math
import re

import pytest
import torch

from medssm.ops import shapes


def read(declared, *given, spatial=True, **rules):
    """The sizes of tensors with the given shapes, None where one is absent."""
    tensors = [None if shape is None else torch.zeros(shape) for shape in given]
    return shapes.sizes(list(zip(shapes.inputs(declared), tensors, strict=True)), spatial, shapes.Rules(**rules))


def refused(message, declared, *given, **rules):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(declared, *given, **rules)


def test_a_letter_is_one_size_in_the_whole_call():
    declared = {"x": "b d", "weight": "d"}
    assert read(declared, (2, 4), (4,)) == {"b": 2, "d": 4}
    refused("weight: expected (4,), got (3,)", declared, (2, 4), (3,))
    refused("weight: expected (0,), got (3,)", declared, (2, 0), (3,))
    refused("x: expected (n, n), got (2, 3)", {"x": "n n"}, (2, 3))


def test_tokens_are_one_axis_or_those_of_an_image():
    declared = {"x": "b *l d"}
    assert read(declared, (2, 3, 4)) == read(declared, (2, 3, 4), spatial=False) == {"b": 2, "*l": (3,), "d": 4}
    assert read(declared, (2, 3, 5, 4)) == {"b": 2, "*l": (3, 5), "d": 4}
    refused("x: expected (b, l, d), got (2, 3, 5, 4)", declared, (2, 3, 5, 4), spatial=False)
    refused("x: expected (b, *spatial, d), got (2, 4)", declared, (2, 4))
    refused("z: expected (2, 3, 5, 4), got (2, 15, 4)", {"x": "b *l d", "z": "b *l d"}, (2, 3, 5, 4), (2, 15, 4))
    refused("x: expected (b, d), got (2, 3, 4)", {"x": "b d"}, (2, 3, 4))


def test_an_image_has_at_most_nine_axes():
    assert read({"x": "b *l d"}, (2, *[1] * 9, 4))["*l"] == (1,) * 9
    with pytest.raises(ValueError, match=r"x: expected \(b, \*spatial, d\)"):
        read({"x": "b *l d"}, (2, *[1] * 10, 4))


def test_a_number_is_that_size():
    assert read({"state": "b 1 n"}, (2, 1, 3))["n"] == 3
    refused("state: expected (b, 1, n), got (2, 4, 3)", {"state": "b 1 n"}, (2, 4, 3))


def test_of_two_forms_either_fits():
    declared = {"x": "b h p", "D": "h | h p"}
    assert read(declared, (2, 3, 4), (3,)) == read(declared, (2, 3, 4), (3, 4)) == {"b": 2, "h": 3, "p": 4}
    refused("D: expected (3,) or (3, 4), got (4,)", declared, (2, 3, 4), (4,))


def test_an_optional_axis_counts_as_one_where_it_is_left_out():
    declared = {"x": "b *l d", "B": "b *l [g] n", "C": "b *l [g] n"}
    assert read(declared, (2, 5, 6), (2, 5, 3), (2, 5, 3))["g"] == 1
    assert read(declared, (2, 5, 6), (2, 5, 1, 3), (2, 5, 3))["g"] == 1
    assert read(declared, (2, 5, 6), (2, 5, 4, 3), (2, 5, 4, 3))["g"] == 4
    assert read(declared, (2, 4, 5, 6), (2, 4, 5, 3), (2, 4, 5, 1, 3))["g"] == 1
    refused("C: expected (2, 5, 4, 3), got (2, 5, 3)", declared, (2, 5, 6), (2, 5, 4, 3), (2, 5, 3))
    refused("C: expected (2, 5, 1, 3) or (2, 5, 3), got (2, 5, 4, 3)", declared, (2, 5, 6), (2, 5, 3), (2, 5, 4, 3))


def test_a_kernel_sees_every_axis():
    with_tokens, without = shapes.inputs({"B": "b *l [g] n", "w": "k [g] n"})
    assert with_tokens.with_every_axis(torch.zeros(2, 5, 3), {"*l": (5,)}).shape == (2, 5, 1, 3)
    assert with_tokens.with_every_axis(torch.zeros(2, 4, 5, 3), {"*l": (4, 5)}).shape == (2, 4, 5, 1, 3)
    assert with_tokens.with_every_axis(torch.zeros(2, 4, 5, 3), {"*l": (4,)}).shape == (2, 4, 5, 3)
    assert with_tokens.with_every_axis(None, {"*l": (4,)}) is None
    assert without.with_every_axis(torch.zeros(4, 3), {}).shape == (4, 1, 3)
    assert without.with_every_axis(torch.zeros(4, 2, 3), {}).shape == (4, 2, 3)


def test_limits_of_an_axis_are_part_of_it():
    for n in (2, 5):
        assert read({"A": "d n"}, (3, n), within={"n": (2, 5)})["n"] == n
    for n in (1, 6):
        refused(f"A: expected (d, n) with n from 2 to 5, got (3, {n})", {"A": "d n"}, (3, n), within={"n": (2, 5)})
    refused("A: expected (d, n) with n at least 2, got (3, 1)", {"A": "d n"}, (3, 1), within={"n": (2, math.inf)})


def test_what_must_divide_names_the_first_tensor_that_has_it():
    declared, rules = {"x": "b h", "B": "b g", "C": "b g"}, {"divides": {"g": "h"}}
    for groups in (1, 3, 6):
        assert read(declared, (2, 6), (2, groups), (2, groups), **rules)["g"] == groups
    for groups in (0, 4, 12):
        refused(f"B: expected (b, g) with g dividing h = 6, got (2, {groups})", declared, (2, 6), (2, groups), (2, groups), **rules)


def test_a_derived_size_is_known_as_soon_as_what_it_comes_from():
    declared, rules = {"weight": "d w", "state?": "d taps"}, {"derived": {"taps": ("w", lambda w: w - 1)}}
    assert read(declared, (3, 5), None, **rules)["taps"] == 4
    assert read(declared, (3, 5), (3, 4), **rules)["taps"] == 4
    refused("state: expected (3, 4), got (3, 5)", declared, (3, 5), (3, 5), **rules)


@pytest.mark.parametrize("declared", [{"x": "b d", "delta": "b r", "proj?": "d r"}, {"delta": "b r", "x": "b d", "proj?": "d r"}])
def test_without_a_tensor_one_size_is_another(declared):
    """Whichever tensor is read first."""
    rules = {"without": {"proj": ("r", "d")}}

    def given(rank):
        return [(2, {"x": 6, "delta": rank}[name]) for name in declared if name != "proj?"]

    assert read(declared, *given(6), None, **rules)["r"] == 6
    assert read(declared, *given(3), (6, 3), **rules)["r"] == 3
    refused("delta: expected (2, 6), got (2, 3)", declared, *given(3), None, **rules)


def test_agree_takes_any_function_s_tensors():
    forms = {"x": "*rows d | d", "weight?": "d"}
    assert shapes.agree(forms, torch.zeros(2, 3, 4), None) == {"*rows": (2, 3), "d": 4}
    with pytest.raises(ValueError, match=r"^weight: expected \(4,\), got \(3,\)$"):
        shapes.agree(forms, torch.zeros(2, 3, 4), torch.zeros(3))


def test_every_tensor_is_of_a_floating_type_and_on_the_main_one_s_device():
    declared, x = shapes.inputs({"w": "d", "x": "b d", "bias?": "d"}), torch.zeros(2, 3)
    shapes.check(declared, (x[0], x, None), 1)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        shapes.check(declared, (x[0].to(dtype), x, x[0]), 1)
    for tensors, error, message in (
        ((x[0], x, x[0].long()), ValueError, "^bias: expected float32, float64, bfloat16 or float16, got int64$"),
        ((x[0], x, x[0].to("meta")), ValueError, "^bias: expected device cpu, where x is, got meta$"),
        ((x[0].to("meta"), x, None), ValueError, "^w: expected device cpu, where x is, got meta$"),
        ((None, x, None), TypeError, "^w: expected a tensor, got None$"),
        ((x[0], None, None), TypeError, "^x: expected a tensor, got None$"),
        ((x[0], x, [1.0]), TypeError, "^bias: expected a tensor, got list$"),
    ):
        with pytest.raises(error, match=message):
            shapes.check(declared, tensors, 1)


def test_numbers_of_a_shape():
    sizes = {"b": 2, "*l": (3, 4), "d": 5}
    assert shapes.shape(("b", "*l", "d"), sizes) == (2, 3, 4, 5)
    assert shapes.totals(sizes) == {"b": 2, "l": 12, "d": 5}
    assert shapes.flat(torch.zeros(2, 3, 4, 5), 2).shape == (2, 12, 5)
    assert shapes.flat(torch.zeros(2, 3, 4, 5), 3).shape == (2, 60)
