"""medssm predict --uncertainty: known members give known entropies, on the grid of each input."""

import dataclasses
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medssm import cli
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment import predict as module
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import Regions
from medssm.segment.uncertainty.members import PASSES, described, dropping, members_of
from medssm.segment.uncertainty.sums import entropy
from medssm.segment.volumetry import VOLUMES, read_volumes
from tests.segment.dicom import series
from tests.segment.synthetic import volume, write

FITTED = Fitted(("MR",), (1, 1, 1), ({"scheme": "none"},), {"background": 0, "ball": 10, "box": 20}, None, (8, 8, 8))
CLASSES = {"background": 0, "value_1": 1, "value_2": 2}
OVERLAPPING = dataclasses.replace(FITTED, classes=CLASSES, regions=Regions({"whole": (1, 2), "core": (2,)}, (1, 2)))
SURE = 200.0  # logits of a network that has no doubt
AFFINE = np.array([[0, 0, -1.5, 1], [0, -1, 0, 2], [1.2, 0, 0, 3], [0, 0, 0, 1.0]])


def constant(*logits, dims=3):
    """A network that gives the same logits everywhere."""
    layer = (nn.Conv3d if dims == 3 else nn.Conv2d)(1, len(logits), 1)
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor(logits, dtype=torch.float32)
    return layer


def run_of(folder, network, fitted=FITTED):
    fitted.save(folder / "fitted.json")
    networks.save(folder, network, networks.describe(network, {}))
    return folder


def runs_of(folder, *logits, fitted=FITTED):
    """A run for each row of logits."""
    dims = len(fitted.patch)
    return [run_of(folder / f"fold_{i}", constant(*row, dims=dims), fitted) for i, row in enumerate(logits)]


def maps(runs, scan, out, model, **options):
    """(entropy, mutual information, result), with the maps' grid checked to be the scan's."""
    result = predict(runs, scan, out / "a.nii.gz", model=model, device="cpu", quiet=True, **({"uncertainty": "folds"} | options))
    files = [nib.load(out / f"a_{what}.nii.gz") for what in ("entropy", "mutual-information")]
    for file in files:
        np.testing.assert_array_equal(file.affine, nib.load(scan).affine)
        assert file.shape == nib.load(scan).shape and file.get_data_dtype() == np.float32
    return *(np.asarray(file.dataobj) for file in files), result


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "a.nii.gz", volume(7, (13, 11, 9))[0][..., 0], AFFINE)


def test_members_that_are_sure_of_different_classes_give_ln_2(scan, tmp_path):
    runs = runs_of(tmp_path, (SURE, 0, 0), (0, SURE, 0))
    found, mutual, result = maps(runs, scan, tmp_path / "out", constant(0, 0, 0))
    np.testing.assert_allclose(found, math.log(2), atol=1e-6)
    np.testing.assert_allclose(mutual, math.log(2), atol=1e-6)
    ball = result["volumes"]["a"]["ball"]  # 13 x 11 x 9 voxels of 1.8 mm^3
    assert (ball["members_low_ml"], ball["members_high_ml"]) == (0, pytest.approx(1287 * 1.8 / 1000)) and "conformal_low_ml" not in ball
    assert result["uncertainty"]["members"] == "2 runs" and "no conformal intervals" in result["uncertainty"]["intervals"]


def test_equal_members_have_entropy_and_no_mutual_information(scan, tmp_path):
    runs = runs_of(tmp_path, *[(0.0, math.log(2), math.log(5))] * 3)  # 1/8, 2/8, 5/8
    found, mutual, result = maps(runs, scan, tmp_path / "out", constant(0, 0, 0))
    wanted = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert mutual.min() >= 0 and mutual.max() < 1e-6
    assert set(np.unique(np.asarray(nib.load(tmp_path / "out/a.nii.gz").dataobj))) == {20}
    box = result["volumes"]["a"]["box"]
    assert box["members_low_ml"] == box["members_high_ml"] == pytest.approx(box["ml"])


def test_three_members_by_hand(scan, tmp_path):
    rows = [(0.3, 0.2, 0.5), (0.6, 0.3, 0.1), (0.05, 0.05, 0.9)]
    runs = runs_of(tmp_path, *[[math.log(p) for p in row] for row in rows])
    found, mutual, _ = maps(runs, scan, tmp_path / "out", constant(0, 0, 0), save_probabilities=True)
    mean = np.mean(rows, 0)
    own = np.mean([-sum(p * math.log(p) for p in row) for row in rows])
    np.testing.assert_allclose(found, -(mean * np.log(mean)).sum(), atol=1e-6)
    np.testing.assert_allclose(mutual, -(mean * np.log(mean)).sum() - own, atol=1e-6)
    np.testing.assert_allclose(np.asarray(nib.load(tmp_path / "out/a_probabilities.nii.gz").dataobj)[1, 2, 3], mean, atol=1e-6)


def test_regions_are_sums_of_binary_entropies(scan, tmp_path):
    def logit(p):
        return math.log(p / (1 - p))

    runs = runs_of(tmp_path, (logit(0.8), logit(0.4)), (logit(0.6), logit(0.2)), fitted=OVERLAPPING)
    found, mutual, result = maps(runs, scan, tmp_path / "out", constant(0, 0))
    binary = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.7, 0.3, 0.8, 0.4, 0.6, 0.2)]
    np.testing.assert_allclose(found, sum(binary[:2]), atol=1e-6)
    np.testing.assert_allclose(mutual, sum(binary[:2]) - sum(binary[2:]) / 2, atol=1e-6)
    assert result["volumes"]["a"]["whole"]["voxels"] == 13 * 11 * 9 and result["volumes"]["a"]["core"]["members_high_ml"] == 0


def test_probabilities_beyond_0_and_1_by_rounding_are_no_number_that_is_not_finite():
    p = torch.tensor([[1.0000001], [-1e-7]])
    assert entropy(p, regions=False).item() == 0 and entropy(p, regions=True).item() == 0


def test_runs_of_different_spacing_and_files_for_the_sums(scan, tmp_path, monkeypatch):
    torch.manual_seed(0)
    fine, coarse = FITTED, dataclasses.replace(FITTED, spacing=(1.3, 1.2, 1.1))
    model = nn.Conv3d(1, 3, 3, padding=1)
    runs = [run_of(tmp_path / "one", nn.Conv3d(1, 3, 3, padding=1), fine), run_of(tmp_path / "two", nn.Conv3d(1, 3, 3, padding=1), coarse)]
    in_memory = maps(runs, scan, tmp_path / "memory", model)[:2]
    monkeypatch.setattr(module, "_room", lambda *_: 0)
    in_files = maps(runs, scan, tmp_path / "files", model)[:2]
    plain = predict(runs, scan, tmp_path / "plain.nii.gz", model=model, device="cpu", quiet=True)
    for one, other in zip(in_memory, in_files, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_array_equal(*(np.asarray(nib.load(tmp_path / file).dataobj) for file in ("memory/a.nii.gz", "plain.nii.gz")))
    assert "members_low_ml" not in plain["volumes"]["a"]["ball"] and "uncertainty" not in plain


def test_mirrored_passes_are_the_members_of_one_run(scan, tmp_path):
    """Left and right change places in the mirrored pass, so a network that says left everywhere disagrees with itself."""
    fitted = dataclasses.replace(FITTED, mirror=(0,), sides=((1, 2),))
    (run,) = runs_of(tmp_path, (0, SURE, 0), fitted=fitted)
    _, mutual, result = maps(run, scan, tmp_path / "out", constant(0, 0, 0), uncertainty="auto")
    np.testing.assert_allclose(mutual, math.log(2), atol=1e-6)
    assert result["uncertainty"]["members"] == "2 mirrored passes"
    plain = predict(run, scan, tmp_path / "m.nii.gz", model=constant(0, 0, 0), device="cpu", quiet=True, mirror=True, save_probabilities=True)
    assert plain["volumes"]["a"]["ball"]["voxels"] == result["volumes"]["a"]["ball"]["voxels"]


def test_dropout_drops_the_same_twice_and_only_while_it_is_asked_to(scan, tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 8, 1), nn.Dropout3d(0.5), nn.Conv3d(8, 3, 1), nn.BatchNorm3d(3), nn.Dropout(0.0))
    run = run_of(tmp_path / "run", model)
    once = maps(run, scan, tmp_path / "one", model, uncertainty="auto")
    again = maps(run, scan, tmp_path / "two", model, uncertainty="dropout")
    assert once[2]["uncertainty"]["members"] == f"{PASSES} passes with dropout" and once[1].max() > 0.01
    np.testing.assert_array_equal(once[1], again[1])
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    model.eval()
    with dropping(model, 1):
        assert [layer.training for layer in model] == [False, True, False, False, False]
        torch.rand(7)
    assert not any(layer.training for layer in model)
    torch.testing.assert_close(torch.rand(3), wanted)


def test_slices_planes_and_lists(tmp_path):
    fitted = dataclasses.replace(FITTED, spacing=(1, 1, 0), patch=(8, 8), slice_axis=2)
    runs = runs_of(tmp_path, (SURE, 0, 0), (0, SURE, 0), fitted=fitted)
    image = volume(7, (13, 11, 9))[0][..., 0]
    files = [write(tmp_path / "scans/a.nii.gz", image), write(tmp_path / "scans/deeper/b.nii.gz", image[:, :, 3])]
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    out = tmp_path / "out"
    model = constant(0, 0, 0, dims=2)
    result = predict(runs, tmp_path / "list.txt", out, model=model, device="cpu", quiet=True, uncertainty="folds")
    assert sorted(result["cases"]) == ["a", "b"]
    assert nib.load(out / "b_mutual-information.nii.gz").shape == (13, 11)
    for name in "ab":
        np.testing.assert_allclose(np.asarray(nib.load(out / f"{name}_entropy.nii.gz").dataobj), math.log(2), atol=1e-6)
    rows = read_volumes(out / VOLUMES)
    assert rows["a"]["ball"]["members_low_ml"] == 0 and rows["b"]["ball"]["members_high_ml"] == pytest.approx(13 * 11 / 1000)


def test_a_series_in_dicom_has_its_maps_in_nifti(tmp_path):
    series(tmp_path / "scan", np.random.default_rng(0).integers(0, 500, (6, 12, 10)).astype(np.int16))
    runs = runs_of(tmp_path, (SURE, 0, 0), (0, SURE, 0), fitted=dataclasses.replace(FITTED, spacing=(0, 0, 0)))
    predict(runs, tmp_path / "scan", tmp_path / "out", model=constant(0, 0, 0), device="cpu", quiet=True, uncertainty="folds", format="dicom-seg")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "scan.dcm",
        "scan_entropy.nii.gz",
        "scan_mutual-information.nii.gz",
        VOLUMES,
    ]
    predict(runs, tmp_path / "scan", tmp_path / "label.nii.gz", model=constant(0, 0, 0), device="cpu", quiet=True)
    np.testing.assert_allclose(nib.load(tmp_path / "out/scan_entropy.nii.gz").affine, nib.load(tmp_path / "label.nii.gz").affine)


def test_the_option_alone_takes_what_there_is_and_says_so(trained, folder, tmp_path, capsys):
    """The two folds of a real training, by the command."""
    words = ["predict", str(trained), str(folder / "imagesTr/case_3_0000.nii.gz"), str(tmp_path / "out"), "--device", "cpu", "--uncertainty"]
    assert cli.main(words) == 0
    assert "uncertainty: from 2 runs; no conformal intervals: 2 held-out patient(s), a level of 0.9 needs 9" in capsys.readouterr().err
    assert cli.main([*words[:-1], "--uncertainty", "mirror", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["uncertainty"]["members"]
    assert said == "2 mirrored passes of each of 2 runs"


def test_a_file_of_other_origin_is_not_written_over(scan, tmp_path):
    runs = runs_of(tmp_path, (SURE, 0, 0), (0, SURE, 0))
    mine = shutil.copy(scan, tmp_path / "label_entropy.nii.gz")
    with pytest.raises(UserError, match=r"label_entropy.nii.gz is there already"):
        predict(runs, scan, tmp_path / "label.nii.gz", model=constant(0, 0, 0), device="cpu", quiet=True, uncertainty="folds")
    with pytest.raises(UserError, match=r"a_entropy.nii.gz: expected one file of that name, got two"):
        read = [scan, shutil.copy(scan, tmp_path / "a_entropy.nii.gz")]
        predict(runs, read, tmp_path / "out", model=constant(0, 0, 0), device="cpu", quiet=True, uncertainty="folds", overwrite=True)
    np.testing.assert_array_equal(np.asarray(nib.load(mine).dataobj), np.asarray(nib.load(scan).dataobj))


def test_intervals_stay_where_a_label_map_is_left_as_it_is(scan, tmp_path):
    runs = runs_of(tmp_path, (SURE, 0, 0), (0, SURE, 0))
    options = {"model": constant(0, 0, 0), "device": "cpu", "quiet": True}
    predict(runs, scan, tmp_path / "out", uncertainty="folds", **options)
    before = (tmp_path / "out" / VOLUMES).read_text()
    assert before.startswith("case,class,voxels,ml,members_low_ml,")
    predict(runs, scan, tmp_path / "out", skip_existing=True, **options)
    assert (tmp_path / "out" / VOLUMES).read_text() == before
    predict(runs, scan, tmp_path / "out", **options)
    assert (tmp_path / "out" / VOLUMES).read_text().startswith("case,class,voxels,ml\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertainty": "folds"}, r"uncertainty: folds needs several runs \(--more-runs"),
        ({"uncertainty": "mirror"}, "uncertainty: mirror needs a network that was trained with mirroring"),
        ({"uncertainty": "dropout"}, "uncertainty: dropout needs a network with dropout, got one without any"),
        ({"uncertainty": "auto"}, "uncertainty: expected several runs .*, a network that was trained with mirroring, or one with dropout"),
        ({"uncertainty": "guess"}, "uncertainty: expected auto, folds, mirror, dropout, got 'guess'"),
        ({"uncertainty": "auto", "level": 1.0}, "level: expected more than 0 and less than 1, got 1.0"),
    ],
)
def test_what_is_not_there_is_one_line(scan, tmp_path, options, message):
    (run,) = runs_of(tmp_path, (SURE, 0, 0))
    with pytest.raises(UserError, match=message) as error:
        predict(run, scan, tmp_path / "out", model=constant(0, 0, 0), device="cpu", quiet=True, **options)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_dropout_is_not_streamed(scan, tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 3, 1), nn.Dropout3d(0.5))
    with pytest.raises(UserError, match="stream: dropout is not streamed"):
        predict(run_of(tmp_path / "run", model), scan, tmp_path / "o.nii.gz", model=model, device="cpu", quiet=True, uncertainty="auto", stream=True)


def test_mirrored_passes_are_not_averaged_twice():
    network, fitted = constant(0, 0), dataclasses.replace(FITTED, mirror=(1, 2))
    run = module._Fold(None, network, fitted)
    kind, members = members_of("auto", [run], mirror=False)
    assert (kind, [member.mirror for member in members]) == ("mirror", [(), (1,), (2,), (1, 2)])
    assert described(*members_of("auto", [run, run], mirror=True)) == "2 runs"
    with pytest.raises(UserError, match="no --mirror beside it"):
        members_of("mirror", [run], mirror=True)
