"""What predict is given, files, nested folders and lists, becomes cases whose label maps have names and places of their own."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssm import cli, options
from medssm.errors import UserError
from medssm.segment.data import load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.images import nifti
from medssm.segment.inputs import cases_of
from medssm.segment.predict import predict
from medssm.segment.volumetry import read_volumes, volumes
from tests.segment.synthetic import nnunet_folder, volume, write

SHAPE = (5, 4, 3)
ZEROS = np.zeros(SHAPE, np.float32)


def scans(root: Path, *places: str) -> list[Path]:
    return [write(root / place, ZEROS) for place in places]


def found(*inputs: Path, channels: int = 1, **options) -> dict[str, list[str]]:
    """{name of the case: its files}"""
    cases = cases_of(inputs, channels, **{"out": Path("out"), **options})
    return {case.name: ["/".join(file.parts[-2:]) for file in case.images] for case in cases}


def listed(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# -- folders and files


def test_cases_of_nested_folders_are_named_by_their_paths(tmp_path):
    scans(tmp_path / "in", "a.nii.gz", "x/a.nii.gz", "x/y/a.nii", "z/.hidden/a.nii.gz")
    (tmp_path / "in" / "empty").mkdir()
    assert list(found(tmp_path / "in")) == ["a", "x/a", "x/y/a"]


def test_channels_belong_together_within_their_folder(tmp_path):
    scans(tmp_path, *(f"{place}/a_000{i}.nii.gz" for place in "xy" for i in (0, 1)))
    assert found(tmp_path, channels=2) == {f"{place}/a": [f"{place}/a_0000.nii.gz", f"{place}/a_0001.nii.gz"] for place in "xy"}


def test_what_was_predicted_is_no_input_of_the_next_time(tmp_path):
    scans(tmp_path, "x/a.nii.gz", "out/x/a.nii.gz")
    assert list(found(tmp_path, out=tmp_path / "out")) == ["x/a"]
    assert list(found(tmp_path, out=tmp_path)) == ["out/x/a", "x/a"]  # predict refuses to write over them


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path):
    scans(tmp_path, "x/a.nii.gz")
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "x")
    assert list(found(tmp_path)) == ["linked/a", "x/a"]


def test_the_folder_of_a_data_set_is_not_segmented_with_its_labels(tmp_path):
    nnunet_folder(tmp_path, cases=1, shape=SHAPE)
    with pytest.raises(UserError, match="the folder of a data set, with images and labels"):
        found(tmp_path)


def test_several_files_are_each_a_case(tmp_path):
    files = scans(tmp_path, "amos_0000.nii.gz", "amos_0001.nii.gz", "x/b.nii.gz")
    assert found(*files) == {"amos": [f"{tmp_path.name}/amos_0000.nii.gz"], "amos_0001": [f"{tmp_path.name}/amos_0001.nii.gz"], "b": ["x/b.nii.gz"]}
    assert list(found(*files[:2], channels=2)) == ["amos"]  # the two are one case, named twice


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = scans(tmp_path, "s/siteA/t1.nii.gz", "s/siteB/t1.nii.gz", "s/siteB/deep/t2.nii.gz")
    assert list(found(*files)) == ["siteA/t1", "siteB/t1", "siteB/deep/t2"]
    one, other = scans(tmp_path, "c.nii", "c.nii.gz")
    with pytest.raises(UserError, match="two files for the case"):
        found(one, other)


def test_what_is_not_there_is_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"no image in this folder"):
        found(tmp_path)
    with pytest.raises(UserError, match=r"none\.nii: no such file"):
        found(tmp_path / "none.nii")
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        found(tmp_path / "none.json")


# -- lists


def test_a_datalist_is_a_list_or_a_table_of_them(tmp_path):
    scans(tmp_path, "a.nii.gz", "b.nii.gz", "c/t1.nii.gz", "c/t2.nii.gz", "d_0000.nii.gz")
    assert list(found(listed(tmp_path / "l.json", ["a.nii.gz", {"image": "b.nii.gz"}, {"image": ["a.nii.gz"]}]))) == ["a", "b"]
    pair = listed(tmp_path / "l.json", [{"image": ["c/t1.nii.gz", "c/t2.nii.gz"], "label": "unread"}])
    assert found(pair, channels=2) == {"t1": ["c/t1.nii.gz", "c/t2.nii.gz"]}
    table = listed(tmp_path / "l.json", {"name": "x", "training": [{"image": "a.nii.gz"}], "test": ["b.nii.gz", "d.nii.gz"]})
    assert list(found(table)) == ["b", "d"]  # the second as nnU-Net's first dataset.json has it
    assert list(found(table, section="training")) == ["a"]
    kept = {
        "training": [{"name": "x", "images": ["a.nii.gz"]}],
        "validation": [{"name": "c", "images": ["c/t1.nii.gz", "c/t2.nii.gz"], "label": "l"}],
    }
    assert found(listed(tmp_path / "cases.json", kept), channels=2, section="validation") == {"c": ["c/t1.nii.gz", "c/t2.nii.gz"]}
    assert list(found(listed(tmp_path / "l.json", {"validation": ["b.nii.gz"], "test": []}))) == ["b"]
    assert list(found(table, tmp_path / "c" / "t1.nii.gz", section="validation")) == ["b", "t1"]  # a file beside it has no sections


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": ["a"], "validation": ["b"]}, r"expected one section \(--section\) of training, validation"),
        ({"testing": ["a.nii.gz"], "test": ["a.nii.gz"], "training": []}, r"expected one section \(--section\) of testing, test$"),
        ({"numTraining": 3}, r"expected one section \(--section\) of cases, got none"),
        ([{"label": "a"}], r"\[0\]: expected a path or"),
        (["a.nii.gz", 3], r"\[1\]: expected a path or"),
        ([{"image": "a.nii.gz", "name": "../a"}], r"\[0\]: name: expected the name of a file, got '../a'"),
        ([{"image": "a.nii.gz", "name": "/a"}], "name: expected the name of a file"),
        ([{"image": "a.nii.gz", "name": ""}], "name: expected the name of a file"),
        ([{"image": "a.nii.gz", "name": 3}], "name: expected the name of a file"),
        ("3", "expected a list of images"),
        ([], "no image in it"),
        (["none.nii.gz"], r"none\.nii\.gz: no such file"),
    ],
)
def test_bad_datalists(tmp_path, content, message):
    scans(tmp_path, "a.nii.gz")
    with pytest.raises(UserError, match=message):
        found(listed(tmp_path / "l.json", content))


def test_labels_of_a_list_are_references(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        write(tmp_path / "found" / f"{name}.nii.gz", np.full(SHAPE, 1, np.uint8))
        write(tmp_path / "labels" / name / "seg.nii.gz", np.full(SHAPE, value, np.uint8))
    entries = [{"name": name, "label": f"labels/{name}/seg.nii.gz", "patient": 0} for name in ("one", "two")]
    table = listed(tmp_path / "cases.json", {"training": [{"label": "unread"}], "validation": entries})
    result = evaluate(tmp_path / "found", table, section="validation", quiet=True)
    assert result["patients"] == 1 and not result["failed"]
    assert (result["cases"]["one"]["1"]["dice"], result["cases"]["two"]["1"]["dice"]) == (1.0, 0.0)
    assert evaluate(tmp_path / "found", table, section="validation", patient=".*", quiet=True)["patients"] == 2
    with pytest.raises(UserError, match="section: expected a datalist"):
        evaluate(tmp_path / "found", tmp_path / "labels", section="validation", quiet=True)
    with pytest.raises(UserError, match="predictions: expected a folder, as the references are a list"):
        evaluate(tmp_path / "found" / "one.nii.gz", table, section="validation", quiet=True)
    with pytest.raises(UserError, match=r'\[0\]: expected \{"label": ...\}'):
        evaluate(tmp_path / "found", listed(tmp_path / "l.json", ["one.nii.gz"]), quiet=True)
    again = [{"label": "labels/one/seg.nii.gz"}, {"label": "labels/two/seg.nii.gz"}]
    with pytest.raises(UserError, match="two labels for the case seg"):
        evaluate(tmp_path / "found", listed(tmp_path / "l.json", again), quiet=True)


def test_a_section_needs_a_datalist_that_has_it(tmp_path):
    (scan,) = scans(tmp_path, "a.nii.gz")
    with pytest.raises(UserError, match="section: expected a datalist"):
        found(scan, section="test")
    with pytest.raises(UserError, match=r"of test, got training$"):
        found(listed(tmp_path / "l.json", {"test": ["a.nii.gz"]}), section="training")


def test_a_text_file_has_a_path_in_each_line(tmp_path):
    (elsewhere,) = scans(tmp_path / "other", "b.nii.gz")
    scans(tmp_path, "my scans/a.nii.gz")
    assert list(found(listed(tmp_path / "l.txt", f"# cases\n my scans/a.nii.gz\r\n\n{elsewhere}\n"))) == ["a", "b"]
    with pytest.raises(UserError, match="no image in it"):
        found(listed(tmp_path / "l.txt", "\n"))
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable text file"):
        found(tmp_path / "l.txt")


# -- the command


def test_the_last_word_is_the_output(tmp_path):
    given = options.read(predict, "medssm predict", ["run", "a.nii.gz", "b.nii.gz", "--quiet", "c.nii.gz", "out"])
    assert (given.values["run"], given.values["inputs"], given.values["out"]) == (
        Path("run"),
        list(map(Path, ("a.nii.gz", "b.nii.gz", "c.nii.gz"))),
        Path("out"),
    )
    with pytest.raises(UserError, match="out: expected a value"):
        options.read(predict, "medssm predict", ["run", "a.nii.gz"])
    file = listed(tmp_path / "o.yaml", "inputs: a.nii.gz\nout: there\n")
    assert options.read(predict, "medssm predict", ["run", "--config", str(file)]).values["inputs"] == [Path("a.nii.gz")]


def test_nested_folders_keep_their_places_and_have_their_volumes(trained, tmp_path, capsys):
    for seed, place in ((7, "siteA/sub-01"), (8, "siteB/sub-01")):
        image, label = volume(seed)
        write(tmp_path / "in" / f"{place}.nii.gz", image[..., 0], np.diag([1, 1, 2, 1]))
        write(tmp_path / "truth" / f"{place}.nii.gz", label, np.diag([1, 1, 2, 1]))
    (tmp_path / "in" / "bad.nii.gz").write_text("")
    out, words = tmp_path / "out", ["predict", str(trained / "fold_0"), str(tmp_path / "in"), str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert cli.main(words) == 1 and "bad.nii.gz" in capsys.readouterr().err
    names = ["siteA/sub-01", "siteB/sub-01"]
    label = {name: np.asarray(nib.load(out / f"{name}.nii.gz").dataobj) for name in names}
    table = read_volumes(out / "volumes.csv")
    assert (out / "volumes.csv").read_text().startswith("case,class,voxels,ml\nsiteA/sub-01,ball,")
    for name in names:
        for value, one in enumerate(("ball", "box"), 1):
            assert table[name][one]["voxels"] == (label[name] == value).sum() > 0
            assert table[name][one]["ml"] == pytest.approx((label[name] == value).sum() * 2 / 1000, rel=1e-5)  # voxels of 2 mm^3
    result = evaluate(out, tmp_path / "truth", quiet=True)
    assert list(result["cases"]) == names and result["mean"]["dice"]["mean"] > 0.8

    (out / "siteB" / "sub-01.nii.gz").unlink()  # gone, so it is predicted anew; the other one is measured from its file
    (out / "volumes.csv").unlink()
    assert cli.main([*words, "--skip-existing"]) == 1
    assert read_volumes(out / "volumes.csv") == table
    (out / "siteA" / "sub-01.nii.gz").unlink()
    predict(trained / "fold_0", tmp_path / "in" / "siteB" / "sub-01.nii.gz", out, device="cpu", quiet=True)
    assert list(read_volumes(out / "volumes.csv")) == ["siteB/sub-01", "sub-01"]  # of a label map that is gone there is no row


def test_a_table_of_other_origin_is_not_written_over(trained, tmp_path):
    (scan,) = scans(tmp_path / "in", "a.nii.gz")
    (tmp_path / "volumes.csv").write_text("patient,age\n")
    with pytest.raises(UserError, match=r"volumes\.csv is there already"):
        predict(trained / "fold_0", scan, tmp_path, device="cpu", quiet=True)


def test_millilitres_of_any_grid():
    label = np.zeros(SHAPE, np.uint8)
    label[:2, 0, 0], label[4] = 2, 5
    turned = np.eye(4)
    turned[:2, :2] = np.array([[0, -2.0], [3.0, 0]])  # 2 x 3 x 1 mm, turned by a quarter
    image = nib.Nifti1Image(label, turned)
    classes = {"a": (2,), "b": (5,), "c": (6,), "region": (2, 5)}
    assert volumes(label, nifti.record(image), classes) == {
        "a": {"voxels": 2, "ml": pytest.approx(0.012)},
        "b": {"voxels": 12, "ml": pytest.approx(0.072)},
        "c": {"voxels": 0, "ml": 0},
        "region": {"voxels": 14, "ml": pytest.approx(0.084)},
    }
    image.header.set_xyzt_units("micron")
    assert volumes(label, nifti.record(image), classes)["a"]["ml"] == pytest.approx(1.2e-11)


# -- a data set's own list


def test_a_listed_case_that_is_not_there_does_not_hide_the_others(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE)
    table = json.loads((folder / "dataset.json").read_text())
    table["training"] = [{"image": f"imagesTr/case_{i}_0000.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"} for i in (2, 1)]
    listed(folder / "dataset.json", table)
    with pytest.raises(UserError, match=r"case_2_0000\.nii\.gz: no such file"):
        load_dataset(folder)


def test_a_misspelt_section_is_named(tmp_path):
    with pytest.raises(UserError, match="no training case found; 'traning': no such entry, training is one"):
        load_dataset(listed(tmp_path / "l.json", {"traning": [{"image": "a", "label": "b"}]}))
