"""Left and right in names of classes, and what mirroring does about them."""

import pytest

from medssm.segment.fit import fit_mirror
from medssm.segment.sides import ordered_axes, pairs, sided, unnamed


@pytest.mark.parametrize(
    "names",
    [
        ("left kidney", "right kidney"),
        ("Left-Hippocampus", "Right-Hippocampus"),
        ("LeftKidney", "RightKidney"),
        ("kidneyL", "kidneyR"),
        ("kidney_l", "kidney_r"),
        ("lkid", "rkid"),
        ("LV", "RV"),
        ("lh-cortex", "rh-cortex"),
        ("lung_lt", "lung_rt"),
        ("ctx-lh-insula", "ctx-rh-insula"),
        ("femur L", "femur R"),
    ],
)
def test_sides_and_their_pairs_are_found(names):
    assert pairs(("background", *names)) == [names] and sided(("background", *names)) == list(names)


@pytest.mark.parametrize("name", ["left atrium", "LeftAtrium", "atrium_L", "lh", "Right"])
def test_one_side_alone_is_a_side(name):
    assert sided(("background", name)) == [name] and not pairs(("background", name))


@pytest.mark.parametrize("names", [("L5", "L4", "S1"), ("liver", "spleen"), ("tumour", "oedema"), ("LV", "MYO"), ("lung",), ("renal", "lesion")])
def test_other_names_have_none(names):
    assert not sided(("background", *names))


def test_each_pair_is_found_once_among_many():
    names = ("left kidney", "right kidney", "liver", "LV", "RV", "left lung upper", "right lung upper", "left lung lower")
    assert pairs(names) == [("left kidney", "right kidney"), ("LV", "RV"), ("left lung upper", "right lung upper")]


@pytest.mark.parametrize(
    ("names", "expected"), [(("background", "class_1"), True), (("background", "3"), True), (("background", "label 2"), True), (("a", "b1"), False)]
)
def test_classes_without_a_name(names, expected):
    assert unnamed(names) is expected


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (("anterior", "posterior"), {1}),
        (("Hippocampus_anterior", "Hippocampus_posterior"), {1}),
        (("left lung upper lobe", "left lung lower lobe", "liver"), {2}),
        (("upper jaw", "lower jaw", "ant horn", "post horn"), {1, 2}),
        (("anterior horn", "posterior wall"), set()),
        (("superior vena cava", "liver"), set()),
        (("background", "front"), set()),
    ],
)
def test_names_that_place_alone_tells_apart(names, axes):
    assert ordered_axes(("background", *names)) == axes


def test_an_axis_along_which_names_tell_classes_apart_is_not_mirrored():
    hippocampus, lobes = ["background", "anterior", "posterior"], ["background", "left lobe upper", "left lobe lower", "right lobe upper"]
    assert fit_mirror("auto", hippocampus, (0, 1, 2)) == ((0, 2), ()) and fit_mirror("swap", hippocampus, (0, 1, 2)) == ((0, 2), ())
    assert fit_mirror("auto", lobes, (0, 1, 2)) == ((1,), ())
    assert fit_mirror((0, 1), hippocampus, (0, 1, 2)) == ((0, 1), ())
