"""Regions that overlap: nnU-Net's description, the loss, what is written, and the way from a data set to scores and a bundle."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from medssm.errors import UserError
from medssm.export.bundle import export_bundle
from medssm.segment.data import load_classes, load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.images import read_label
from medssm.segment.losses import RegionLoss
from medssm.segment.predict import predict
from medssm.segment.preprocess import IGNORE, Fitted
from medssm.segment.regions import Regions, decided, structures, take_apart
from medssm.segment.train import train
from medssm.segment.volumetry import read_volumes
from tests.export.test_bundle import run_without_engine
from tests.segment.synthetic import UNET, nnunet_folder, volume, write

BRATS = {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "enhancing": 3}
REGIONS = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}, (1, 2, 3))
CLASSES = {"background": 0, "value_1": 1, "value_2": 2, "enhancing": 3}


def test_nnunets_description_is_classes_and_regions():
    assert take_apart(BRATS, [1, 2, 3], "d") == (CLASSES, REGIONS)
    assert take_apart({**BRATS, "ignore": 4}, [1, 2, 3], "d") == (CLASSES | {"ignore": 4}, REGIONS)
    shared = take_apart({"background": 0, "whole": [1, 2], "part": [1, 3], "one": [2, 2]}, [1, 1, 2], "d")  # two regions may be written as one value
    assert shared[1] == Regions({"whole": (1, 2), "part": (1, 3), "one": (2,)}, (1, 1, 2)) and shared[0]["one"] == 2
    assert structures(CLASSES, REGIONS) == REGIONS.values and structures(CLASSES, Regions())["value_2"] == (2,)


@pytest.mark.parametrize("labels", [{"background": 0, "a": 1}, {"0": "background", "1": "a"}, None, {"background": 0, "a": [1]}])
def test_labels_of_one_value_each_are_no_regions(labels):
    plain, regions = take_apart(labels, None, "d")
    assert not regions and plain == (labels if not labels or labels.get("a") != [1] else {"background": 0, "a": 1})


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        (BRATS, None, "regions_class_order: expected for each of whole, core, enhancing one of its values, .* got None"),
        (BRATS, [1, 2], "regions_class_order: expected"),
        (BRATS, [1, 1, 3], "regions_class_order: expected"),
        (BRATS, {"whole": 1}, "regions_class_order: expected"),
        ({"background": 0, "core": [2, 3], "whole": [1, 2, 3]}, [2, 1], "core is written over by whole, which holds it: name the outer region first"),
        ({"background": 0, "whole": [0, 1]}, [1], "whole: a region has neither the background's value"),
        ({"background": 0, "whole": [1, 2], "ignore": 2}, [1], "whole: a region has neither the background's value nor the ignored one"),
        ({"background": 0, "whole": [1, "2"]}, [1], r"whole: expected a value or a list of values, got \[1, '2'\]"),
        ({"background": 0, "whole": []}, [1], "whole: expected a value or a list"),
    ],
)
def test_bad_descriptions(labels, order, message):
    with pytest.raises(UserError, match=message):
        take_apart(labels, order, "d")


def test_the_last_region_that_is_found_is_written():
    found = torch.tensor([[0.4, 0.6, 0.9, 0.9, 0.1], [0.9, 0.4, 0.6, 0.7, 0.5], [0.1, 0.2, 0.4, 0.6, 0.3]])
    assert decided(found, [0, 1, 2, 3], REGIONS).tolist() == [2, 1, 2, 3, 0]
    assert decided(found, [0, 2, 3, 5], Regions({"a": (2,), "b": (3,), "c": (5,)}, (2, 3, 5))).tolist() == [2, 1, 2, 3, 0]
    assert decided(iter(found), [0, 1, 2], Regions()).tolist() == found.argmax(0).tolist() == [1, 0, 0, 0, 1]
    assert decided(torch.tensor([[0.5], [0.5]]), [0, 1], Regions()).tolist() == [0]


def test_the_loss_is_dice_and_binary_cross_entropy_of_each_region():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 5, 6, requires_grad=True), torch.randint(0, 4, (2, 1, 4, 5, 6))
    wanted = torch.cat([torch.isin(label, torch.tensor(values)) for values in REGIONS.values.values()], 1).float()
    loss = RegionLoss([(1, 2, 3), (2, 3), (3,)], 4)
    expected = DiceLoss(sigmoid=True, batch=True)(logits, wanted) + torch.nn.BCEWithLogitsLoss()(logits, wanted)
    torch.testing.assert_close(loss(logits, label), expected)
    torch.testing.assert_close(loss([logits, logits], label), expected)
    loss(logits, label).backward()
    assert all(logits.grad[:, i].abs().sum() > 0 for i in range(3))


def test_ignored_voxels_count_in_no_region():
    torch.manual_seed(0)
    logits, label = torch.randn(1, 2, 4, 4, 4), torch.randint(0, 3, (1, 1, 4, 4, 4))
    loss = RegionLoss([(1, 2), (2,)], 3)
    part, rest = label.clone(), logits.clone()
    part[..., 2:] = IGNORE
    rest[..., 2:] = 9.0
    torch.testing.assert_close(loss(rest, part), loss(logits[..., :2], label[..., :2]))
    assert loss(logits, torch.full_like(label, IGNORE)) == 0


# -- from a data set to scores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A region of ball and box, and the box alone."""
    root = nnunet_folder(tmp_path_factory.mktemp("regions"))
    table = json.loads((root / "dataset.json").read_text())
    table |= {"labels": {"background": 0, "both": [1, 2], "box": 2}, "regions_class_order": [1, 2]}
    (root / "dataset.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    kwargs = {**UNET, "norm": "batch"}
    result = train(
        data,
        out,
        model="monai.networks.nets.UNet",
        model_kwargs=kwargs,
        patch=(32, 32, 32),
        max_steps=60,
        lr=0.01,
        fold=0,
        folds=4,
        validations=1,
        device="cpu",
        quiet=True,
    )
    assert list(result["validation"]) == ["both", "box", "mean"] and result["validation"]["mean"] > 0.8
    return out


def test_a_run_carries_its_regions(data, run):
    assert load_dataset(data).regions == Fitted.load(run / "fitted.json").regions == Regions({"both": (1, 2), "box": (2,)}, (1, 2))
    assert load_classes(run) == load_classes(data) == ({"both": (1, 2), "box": (2,)}, None)
    assert json.loads((run / "config.json").read_text())["kwargs"]["out_channels"] == 2
    assert Fitted.load(run / "fitted.json").mirror == (0,)


def test_a_label_map_is_predicted_and_each_region_scored(run, data, tmp_path):
    predict(run, data / "imagesTr", tmp_path, device="cpu", save_probabilities=True, quiet=True)
    label, _ = read_label(tmp_path / "case_0.nii.gz")
    assert set(np.unique(label)) == {0, 1, 2} and nib.load(tmp_path / "case_0_probabilities.nii.gz").shape[-1] == 2
    found = np.moveaxis(np.asarray(nib.load(tmp_path / "case_0_probabilities.nii.gz").dataobj), -1, 0)
    np.testing.assert_array_equal(label, np.where(found[1] > 0.5, 2, np.where(found[0] > 0.5, 1, 0)))
    assert found.sum(0).max() > 1.5  # two sigmoids, not a softmax
    volumes = read_volumes(tmp_path / "volumes.csv")["case_0"]
    assert (volumes["both"]["voxels"], volumes["box"]["voxels"]) == ((label > 0).sum(), (label == 2).sum())
    for file in tmp_path.glob("*_probabilities.nii.gz"):
        file.unlink()
    result = evaluate(tmp_path, data / "labelsTr", classes=run, quiet=True)
    assert list(result["classes"]) == ["both", "box"] and result["mean"]["dice"]["mean"] > 0.85
    truth = read_label(data / "labelsTr" / "case_0.nii.gz")[0]
    expected = 2 * ((label > 0) & (truth > 0)).sum() / ((label > 0).sum() + (truth > 0).sum())
    assert result["cases"]["case_0"]["both"]["dice"] == pytest.approx(expected)
    assert evaluate(tmp_path, data / "labelsTr", classes={"both": [1, 2], "box": 2}, quiet=True)["classes"] == result["classes"]


def test_a_value_outside_the_regions_is_named(run, data, tmp_path):
    label, _ = read_label(data / "labelsTr" / "case_0.nii.gz")
    write(tmp_path / "case_0.nii.gz", np.where(label == 2, 7, label).astype(np.uint8))
    with pytest.raises(UserError, match=r"label value\(s\) 7 outside the classes \[0, 1, 2\]"):
        evaluate(tmp_path / "case_0.nii.gz", data / "labelsTr", classes=run, quiet=True)


def test_a_bundle_writes_the_same_labels(run, tmp_path):
    write(tmp_path / "in" / "case.nii.gz", volume(7)[0][..., 0])
    predict(run, tmp_path / "in", tmp_path / "wanted", device="cpu", quiet=True)
    export_bundle(run, tmp_path / "bundle")
    run_without_engine(tmp_path / "bundle", tmp_path / "in", tmp_path / "found")
    found, wanted = (np.asarray(nib.load(tmp_path / file).dataobj) for file in ("found/case_seg.nii.gz", "wanted/case.nii.gz"))
    assert np.mean(found != wanted) <= 1e-3 and set(np.unique(found)) == {0, 1, 2}


def test_sides_of_regions_are_not_exchanged(tmp_path):
    data = nnunet_folder(tmp_path, cases=1, shape=(16, 16, 16))
    table = json.loads((data / "dataset.json").read_text())
    table |= {"labels": {"background": 0, "left lung": [1, 2], "right lung": 2}, "regions_class_order": [1, 2]}
    (data / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="mirror: swap exchanges classes of one voxel each"):
        train(data, tmp_path / "run", model="monai.networks.nets.UNet", model_kwargs=UNET, mirror="swap", device="cpu", quiet=True)
