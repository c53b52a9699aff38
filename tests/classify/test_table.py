"""Data sets of a classification, their folds, and what is wrong with them in one clear line."""

import csv
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from medssm.classify.folds import assign, split
from medssm.classify.table import Columns, Sample, classes_of, load_samples, read_table
from medssm.errors import UserError
from tests.classify.pictures import folder, table


def lines(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def plain(tmp_path):
    """A folder of two classes without a CSV."""
    return folder(tmp_path / "plain", groups=3, classes=("b", "a"), each=1)


def test_a_folder_of_classes(plain):
    samples, said = load_samples(plain)
    assert [sample.name for sample in samples] == [f"{c}/p{i}_0.png" for c in "ab" for i in range(3)]
    assert {sample.label for sample in samples} == {"a", "b"} and {sample.group for sample in samples} == {None}
    assert said[0] == f"classes: the folders of {plain}" and said[1].startswith("groups: none known, so every image is one of its own")


def test_the_group_is_found_in_the_name(plain):
    samples, said = load_samples(plain, group=r"(p\d)")
    assert [sample.group for sample in samples] == ["p0", "p1", "p2"] * 2 and len(said) == 1


def test_a_csv_in_the_folder_names_the_groups(cells):
    samples, said = load_samples(cells)
    assert {sample.group for sample in samples} == {f"p{i}" for i in range(8)} and len(samples) == 48
    assert said == [f"table: {cells / 'table.csv'} (path: 'file', label: 'class', group: 'patient')"]
    assert load_samples(cells / "table.csv")[0] == samples


def test_columns_by_any_name(plain):
    lines(plain / "t.csv", ("Grade", "scan", "who"), ("x", "a/p0_0.png", "1"), ("y", "b/p0_0.png", "2"))
    samples, _ = load_samples(plain / "t.csv", Columns("scan", "Grade", "who"))
    assert [(sample.label, sample.group) for sample in samples] == [("x", "1"), ("y", "2")]
    lines(plain / "u.csv", ("Image Path", "DIAGNOSIS", "Patient_ID"), ("a/p0_0.png", "10", "1"), ("b/p0_0.png", "9", "2"))
    samples, _ = load_samples(plain / "u.csv")
    assert [(sample.label, sample.group) for sample in samples] == [("10", "1"), ("9", "2")] and classes_of(samples) == ("9", "10")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((("file", "class"), ("a/p0_0.png", "x"), ("a/p1_0.png", "x")), "t.csv: expected two classes or more, got x"),
        ((("file", "class"), ("a/p0_0.png", "x"), ("a/p1_0.png", "")), "t.csv: no label for a/p1_0.png"),
        ((("file", "class"), ("a/none.png", "x"), ("a/p1_0.png", "y")), "a/none.png: no such file"),
        ((("file", "class"), ("a/p0_0.png", "x"), ("a/p0_0.png", "y")), "t.csv: line 3: a/p0_0.png a second time"),
        ((("file", "class"), ("a/p0_0.png", "x"), ("b/../a/p0_0.png", "y")), "a/p0_0.png and b/../a/p0_0.png are one file"),
        ((("file", "class"), ("a/p0_0.png", "b/p0_0.png"), ("a/p1_0.png", "b/p1_0.png")), "leave out --task classify"),
        ((("name", "class"), ("a/p0_0.png", "x")), "t.csv: no column of paths: expected one of path, file,"),
        ((("file", "class", "patient"), ("a/p0_0.png", "x", "1"), ("a/p1_0.png", "y", "")), "t.csv: no group for a/p1_0.png, where other"),
        ((("file", "class"),), "t.csv: no row in it"),
        ((("file", "class"), ("", "x")), "t.csv: line 2: no path"),
    ],
)
def test_a_bad_csv_is_one_clear_line(plain, rows, message):
    with pytest.raises(UserError) as error:
        load_samples(lines(plain / "t.csv", *rows))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_data_sets_are_one_clear_line(plain, tmp_path):
    def message(path, **kwargs):
        with pytest.raises(UserError) as error:
            load_samples(path, **kwargs)
        return str(error.value)

    assert message(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file or folder")
    assert "expected a folder with a subfolder for each class, or a CSV" in message(next(plain.glob("*/*.png")))
    assert "columns are those of a CSV" in message(plain, columns=Columns(label="x"))
    lines(plain / "t.csv", ("file", "class"), ("a/p0_0.png", "x"), ("b/p0_0.png", "y"))
    assert message(plain, columns=Columns(label="x")) == f"{plain / 't.csv'}: no column 'x': expected one of file, class (--label-column)"
    table(plain, "other.csv")
    assert "other.csv and t.csv list images: name the one to train on" in message(plain)
    assert message(plain / "a") == f"{plain / 'a'}: expected two classes or more, got none"
    for part in ("images", "masks"):
        (tmp_path / "masks" / part).mkdir(parents=True)
    assert "a data set of label maps, one for each image: leave out --task classify" in message(tmp_path / "masks")
    folder(tmp_path / "parts" / "train", groups=1), folder(tmp_path / "parts" / "test", groups=1)
    assert "test, train are parts, no classes: name one of them" in message(tmp_path / "parts")


def test_a_table_to_predict_needs_no_labels(plain):
    samples, _ = read_table(lines(plain / "t.csv", ("image",), ("a/p0_0.png",)))
    assert samples == [Sample("a/p0_0.png", plain / "a/p0_0.png")]


def drawn(seed: int, groups: int = 60):
    """Labels of 1 to 6 images for each group, of rare and frequent classes."""
    source = random.Random(seed)
    pairs = [(source.choice("aaaaaabbbc"), f"g{i}") for i in range(groups) for _ in range(source.randint(1, 6))]
    source.shuffle(pairs)
    return [label for label, _ in pairs], [group for _, group in pairs]


@pytest.mark.parametrize("seed", range(4))
def test_a_group_is_in_one_part_and_the_classes_are_spread(seed):
    labels, groups = drawn(seed)
    parts = assign(labels, groups, 5, seed)
    assert len({*zip(groups, parts, strict=True)}) == len(set(groups))
    for name in "abc":
        counts = np.bincount([part for label, part in zip(labels, parts, strict=True) if label == name], minlength=5)
        assert counts.max() - counts.min() <= 6, (name, counts)  # no more than the largest group


def test_parts_depend_on_the_seed_and_not_on_the_order():
    labels, groups = drawn(0)
    parts = dict(zip(groups, assign(labels, groups, 3, 0), strict=True))
    again = dict(zip(groups[::-1], assign(labels[::-1], groups[::-1], 3, 0), strict=True))
    assert parts == again and parts != dict(zip(groups, assign(labels, groups, 3, 1), strict=True))


def test_folds_hold_each_image_out_once(cells):
    samples, _ = load_samples(cells)
    sides = [split(samples, fold, 4, 0) for fold in range(4)]
    assert sorted(sample.name for _, held_out in sides for sample in held_out) == sorted(sample.name for sample in samples)
    for training, held_out in sides:
        assert not {sample.group for sample in training} & {sample.group for sample in held_out}
        assert len(training) + len(held_out) == len(samples) and {sample.label for sample in held_out} == {"disc", "dark", "bar"}
    for (_, one), (_, other) in itertools.combinations(sides, 2):
        assert not {sample.group for sample in one} & {sample.group for sample in other}
    assert split(samples, None, 4, 0) == (samples, [])


def test_bad_folds_are_one_clear_line(cells, plain):
    def message(samples, *arguments):
        with pytest.raises(UserError) as error:
            split(samples, *arguments)
        return str(error.value)

    samples, _ = load_samples(cells)
    assert message(samples, 0, 9, 0) == "folds: expected 2 to 8 (the number of groups), got 9"
    assert message(samples, 4, 4, 0) == "fold: expected 0 to 3, got 4"
    rare = [sample for sample in samples if sample.label != "bar" or sample.group == "p0"]
    assert message(rare, 0, 4, 0).startswith("folds: the class bar has 1 group, fewer than the 4 folds")
    Image.new("RGB", (8, 8)).save(plain / "a" / "more.png")
    assert message(load_samples(plain)[0], 0, 4, 0).startswith("folds: the class b has 3 images, fewer than the 4 folds")
