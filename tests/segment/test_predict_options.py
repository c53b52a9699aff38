"""What each option of predict does, with networks whose answer for a voxel is known: each class's logit is the voxel's value times a number."""

import contextlib
import dataclasses
import json
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medssm import cli
from medssm.errors import UserError
from medssm.segment import networks, postprocess
from medssm.segment import predict as module
from medssm.segment.images import read_label
from medssm.segment.predict import predict, show
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import Regions
from medssm.segment.volumetry import read_volumes
from tests.segment.synthetic import write
from tests.segment.test_predict import AFFINES

CLASSES = {"background": 0, "ball": 10, "box": 300}
FITTED = Fitted(("MR",), (1, 1, 1), ({"scheme": "none"},), CLASSES, None, (8, 8, 8), mirror=(0,))
SLOPES = (0.0, 1.0, -1.0)  # of the logits: positive voxels are ball, negative ones box
SHAPE = (16, 8, 8)


class Voxelwise(nn.Module):
    """Logits (b, classes, x, y, z) from single voxels."""

    seen: ClassVar[list[tuple[int, torch.dtype]]] = []  # of each call the number of windows and the type of the logits

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 1)

    def forward(self, x):
        logits = self.layer(x)
        self.seen.append((len(x), logits.dtype))
        return logits


def run(folder, slopes=SLOPES, fitted=FITTED):
    network = Voxelwise()
    with torch.no_grad():
        network.layer.weight.copy_(torch.tensor(slopes).view(3, 1, 1, 1, 1))
        network.layer.bias.zero_()
    fitted.save(folder / "fitted.json")
    networks.save(folder, network, networks.describe(network, {}))
    return folder


def segment(runs, inputs, out, **options):
    return predict(runs, inputs, out, **{"device": "cpu", "model": Voxelwise(), "quiet": True, **options})


def probabilities(data, *slopes):
    """(x, y, z, classes), averaged over networks."""
    logits = [torch.from_numpy(data)[..., None] * torch.tensor(one) for one in slopes or (SLOPES,)]
    return torch.stack([one.softmax(-1) for one in logits]).mean(0).numpy()


@pytest.fixture
def data():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def scan(tmp_path, data):
    return write(tmp_path / "scans" / "a.nii.gz", data)


def saved(path):
    return np.asanyarray(nib.load(path).dataobj)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [(1, torch.float32)] * 3),  # windows of 8 voxels along 16, half over each other
        ({"overlap": 0.0}, [(1, torch.float32)] * 2),
        ({"overlap": 0.75}, [(1, torch.float32)] * 5),
        ({"batch": 2}, [(2, torch.float32), (1, torch.float32)]),
        ({"mirror": True}, [(1, torch.float32)] * 6),
        ({"precision": "bf16-mixed"}, [(1, torch.bfloat16)] * 3),
    ],
)
def test_options_of_the_windows(scan, data, tmp_path, options, calls):
    Voxelwise.seen.clear()
    segment(run(tmp_path / "run"), scan, tmp_path / "out", save_probabilities=True, **options)
    assert Voxelwise.seen == calls
    found = saved(tmp_path / "out" / "a_probabilities.nii.gz")
    np.testing.assert_allclose(found, probabilities(data), atol=1e-2 if options.get("precision") else 1e-6)


def test_half_precision_is_the_default_on_cuda_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [module.half_of("auto", device) for device in (cpu, cuda)] == [None, torch.float16]
    assert [module.half_of("32-true", cuda), module.half_of("16-mixed", cpu)] == [None, torch.float16]


@pytest.mark.parametrize("name", ["RAS", "LAS", "SPL"])
def test_probabilities_have_the_axes_of_the_image(tmp_path, data, name):
    fitted = dataclasses.replace(FITTED, spacing=(0, 0, 0))  # the image's own voxels, along any axes
    scan = write(tmp_path / "a.nii.gz", data, AFFINES[name])
    segment(run(tmp_path / "run", fitted=fitted), scan, tmp_path / "out", save_probabilities=True)
    file = nib.load(tmp_path / "out" / "a_probabilities.nii.gz")
    np.testing.assert_allclose(np.asarray(file.dataobj), probabilities(data), atol=1e-6)
    np.testing.assert_array_equal(read_label(tmp_path / "out" / "a.nii.gz")[0], np.where(data > 0, 10, 300))
    np.testing.assert_array_equal(file.affine, nib.load(scan).affine)


def test_any_number_of_runs_is_averaged(tmp_path, scan, data):
    """Those of a folder, of a list and of `more_runs`."""
    slopes = [SLOPES, (1.0, 0.0, 2.0), (-3.0, 0.5, 0.0), (0.0, 0.0, 5.0)]
    for i, one in enumerate(slopes):
        run(tmp_path / ("folds" if i < 2 else "others") / f"fold_{i}", one)
    more = [tmp_path / "others" / f"fold_{i}" for i in (2, 3)]
    for name, runs, options in (("list", [tmp_path / "folds", *more], {}), ("more", tmp_path / "folds", {"more_runs": more})):
        segment(runs, scan, tmp_path / name, save_probabilities=True, **options)
        np.testing.assert_allclose(saved(tmp_path / name / "a_probabilities.nii.gz"), probabilities(data, *slopes), atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"channels": ("CT",)},
        {"classes": {**CLASSES, "box": 301}},
        {"regions": Regions({"ball": (10,), "both": (10, 300), "box": (300,)}, (10, 10, 300))},
    ],
    ids=lambda other: next(iter(other)),
)
def test_runs_are_of_one_kind(tmp_path, scan, other):
    run(tmp_path / "runs" / "fold_0"), run(tmp_path / "runs" / "fold_1", fitted=dataclasses.replace(FITTED, **other))
    with pytest.raises(UserError, match=rf"run: .*fold_1 has the {next(iter(other))} .*, .*fold_0 has"):
        segment(tmp_path / "runs", scan, tmp_path / "out")


@pytest.mark.parametrize(("values", "dtype"), [((0, 255), np.uint8), ((0, 256), np.uint16), ((0, -1, 255), np.int16), ((3,), np.uint8)])
def test_a_label_map_has_the_smallest_type_that_holds_its_values(values, dtype):
    assert module._smallest(np.array(values)) == dtype


def test_what_takes_the_place_of_nan_is_a_number(tmp_path, scan):
    for nan in (np.nan, np.inf):
        with pytest.raises(UserError, match=f"nan: expected a finite number, got {nan}"):
            segment(run(tmp_path / "run"), scan, tmp_path / "out", nan=nan)


# -- post-processing


@pytest.mark.parametrize("affine", [np.diag([2, 1, 1, 1.0]), np.diag([-2, 1, 1, 1.0]), np.diag([2e-3, 1e-3, 1e-3, 1])], ids=["RAS", "LAS", "metres"])
def test_small_parts_go_by_millilitres_of_any_grid(tmp_path, affine):
    """Parts of two and of three voxels of 2 mm^3: 0.004 and 0.006 ml."""
    data = np.full(SHAPE, -1, np.float32)
    data[1:4, 1:4, 1:4] = data[8, 1:3, 1] = data[8, 1:4, 5] = 1
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("meter" if affine[1, 1] < 1 else "mm")
    nib.save(image, tmp_path / "a.nii.gz")
    folder = run(tmp_path / "run", fitted=dataclasses.replace(FITTED, spacing=(0, 0, 0)))
    postprocess.save(folder / postprocess.POSTPROCESSING, {"ball": {"smallest_ml": 0.005}}, {})
    result = segment(folder, tmp_path / "a.nii.gz", tmp_path / "out")
    found = read_label(tmp_path / "out" / "a.nii.gz")[0]
    assert not found[8, 1:3, 1].any() and (found[8, 1:4, 5] == 10).all() and (found[1:4, 1:4, 1:4] == 10).all()
    assert result["volumes"]["a"]["ball"] == {"voxels": 30, "ml": pytest.approx(0.06)}


def test_a_filled_hole_has_the_value_of_its_class(tmp_path):
    data = np.zeros(SHAPE, np.float32)
    data[1:6, 1:6, 1:6] = -1
    data[3, 3, 3] = 0
    folder = run(tmp_path / "run")
    postprocess.save(folder / postprocess.POSTPROCESSING, {"box": {"fill_holes": True}}, {})
    segment(folder, write(tmp_path / "a.nii.gz", data), tmp_path / "out")
    assert (read_label(tmp_path / "out" / "a.nii.gz")[0][1:6, 1:6, 1:6] == 300).all()


def test_only_what_every_run_chose_is_done(tmp_path, scan, capsys):
    for i in range(2):
        folder = run(tmp_path / "runs" / f"fold_{i}")
        postprocess.save(folder / postprocess.POSTPROCESSING, {"ball": {"fill_holes": True}} if i == 0 else {}, {})
    segment(tmp_path / "runs", scan, tmp_path / "out", quiet=False)
    assert "post-processing" not in capsys.readouterr().err


# -- several cases


def test_of_the_only_case_that_is_left_the_failure_is_reported(tmp_path, scan):
    folder = run(tmp_path / "run")
    segment(folder, scan, tmp_path / "out")
    write(scan.parent / "b.nii.gz", np.ones(SHAPE, np.float32))
    result = segment(folder, scan.parent, tmp_path / "out", skip_existing=True)
    assert result["skipped"] == ["a"] and list(result["failed"]) == ["b"] and "every voxel of the image is 1" in result["failed"]["b"]
    assert list(result["volumes"]) == ["a"]


def test_an_interrupt_keeps_the_volumes_of_what_is_done(tmp_path, scan, data, monkeypatch):
    write(scan.parent / "b.nii.gz", data)
    real = module.read_stored

    def read(files, *rest):
        if files[0].path.name == "b.nii.gz":
            raise KeyboardInterrupt
        return real(files, *rest)

    monkeypatch.setattr(module, "read_stored", read)
    with pytest.raises(KeyboardInterrupt):
        segment(run(tmp_path / "run"), scan.parent, tmp_path / "out")
    assert list(read_volumes(tmp_path / "out" / "volumes.csv")) == ["a"]


def test_a_table_of_other_origin_is_written_over_when_asked(tmp_path, scan):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.csv").write_text("patient,age\n")
    with pytest.raises(UserError, match=r"volumes\.csv is there already"):
        segment(run(tmp_path / "run"), scan, tmp_path / "out")
    segment(tmp_path / "run", scan, tmp_path / "out", overwrite=True)
    assert list(read_volumes(tmp_path / "out" / "volumes.csv")) == ["a"]


def test_a_case_that_is_predicted_again_has_its_new_volumes(tmp_path, scan, data):
    segment(run(tmp_path / "one"), scan, tmp_path / "out")
    segment(run(tmp_path / "other", (0.0, -1.0, 1.0)), scan, tmp_path / "out")  # what was ball is box
    assert read_volumes(tmp_path / "out" / "volumes.csv")["a"]["box"]["voxels"] == (data > 0).sum()


def test_progress_is_over_cases_and_runs(tmp_path, scan, data, monkeypatch):
    write(scan.parent / "b.nii.gz", data)
    for i in range(2):
        run(tmp_path / "runs" / f"fold_{i}")
    told = []
    monkeypatch.setattr(module, "progress", lambda title, quiet: contextlib.nullcontext(lambda *step: told.append(step)))
    segment(tmp_path / "runs", scan.parent, tmp_path / "out", overlap=0.0)
    assert told == [(i / 8, "a" if i <= 4 else "b") for i in range(1, 9)]


def test_the_summary_counts_what_was_done(capsys):
    result = {"cases": {"a": "x"}, "failed": {}, "skipped": [], "seconds": 1.25}
    show(result, {"out": "out"})
    show({**result, "failed": {"b": "bad"}, "skipped": ["c", "d"]}, {"out": "out"})
    assert capsys.readouterr().out == "1 case(s) in 1.2 s: out\n1 case(s) in 1.2 s, 1 failed, 2 skipped: out\n"


def test_a_section_of_a_list_by_the_command(tmp_path, data, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.nii.gz", data)
    (tmp_path / "list.json").write_text(json.dumps({"training": ["a.nii.gz"], "validation": ["b.nii.gz"]}))
    asked = []
    monkeypatch.setattr(module, "_predict_case", lambda case, *rest: asked.append(case.name) or {})
    monkeypatch.setattr(module, "_load", lambda folder, *rest: module._Fold(folder, Voxelwise(), FITTED))
    words = ["predict", run(tmp_path / "run"), tmp_path / "list.json", tmp_path / "out", "--section", "validation", "--device", "cpu", "--quiet"]
    assert cli.main(list(map(str, words))) == 0 and asked == ["b"]
