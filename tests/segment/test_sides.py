"""Left and right in names of classes, and what mirroring does about them."""

import pytest

from medssm.segment.sides import pairs, sided, unnamed


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
        ("kidl", "kidr"),
    ],
)
def test_sides_and_their_pairs_are_found(names):
    assert pairs(("background", *names)) == [names] and sided(("background", *names)) == list(names)


@pytest.mark.parametrize("name", ["left atrium", "LeftAtrium", "atrium_L", "lung_lt", "lh", "Right"])
def test_one_side_alone_is_a_side(name):
    assert sided(("background", name)) == [name] and not pairs(("background", name))


@pytest.mark.parametrize("names", [("L5", "L4", "S1"), ("liver", "spleen"), ("tumour", "oedema"), ("LV", "MYO"), ("lung",), ("renal", "lesion")])
def test_other_names_have_none(names):
    assert not sided(("background", *names))


def test_each_pair_is_found_once_among_many():
    names = ("left kidney", "right kidney", "liver", "LV", "RV", "left lung upper", "right lung upper", "left lung lower")
    assert pairs(names) == [("left kidney", "right kidney"), ("LV", "RV"), ("left lung upper", "right lung upper")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("background", "class_1"), True), (("background", "3"), True), (("background", "label 2"), True), (("a", "b1", "3rd ventricle"), False)],
)
def test_classes_without_a_name(names, expected):
    assert unnamed(names) is expected
