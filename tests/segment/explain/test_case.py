"""medssm predict --explain: maps on the input's grid, figures, a page, and what cannot be explained."""

import importlib.util
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm import cli
from medssm.segment.cases import Case
from medssm.segment.explain import maps
from medssm.segment.explain.case import Explainer, summary
from medssm.segment.explain.sight import Run
from medssm.segment.networks import load
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from medssm.segment.train import train
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import nnunet_folder, volume, write
from tests.segment.test_predict import AFFINES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")
METHODS = ("integrated-gradients", "occlusion")
NETWORK = {"size": "tiny", "strides": [1, 2, 2, 2, 2]}
SMALL = (30, 32, 28)  # one window of the networks


@pytest.fixture(autouse=True)
def few_boxes(monkeypatch):
    monkeypatch.setattr(maps, "_BOXES", 27)


@pytest.fixture(scope="module")
def scans(folder, tmp_path_factory):
    """A folder of medssm_unet's weights, hardly trained, and what it predicts for a scan with --explain."""
    root = tmp_path_factory.mktemp("scans")
    train(folder, root / "run", model_kwargs=NETWORK, patch=(32, 32, 32), max_steps=4, lr=0.01, device="cpu", quiet=True)
    return root / "run"


@pytest.fixture
def only(trained):
    return trained / "fold_0"


def explained(run, path, out, wanted="ball", **options):
    result = predict(run, path, out, device="cpu", quiet=True, explain=wanted, **options)
    assert not result["failed"]
    (found,) = result["explained"].values()
    return found


def read(path):
    return np.asarray(nib.load(path).dataobj)


def test_maps_come_back_on_the_inputs_grid_by_the_command(only, tmp_path, capsys):
    path = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0], AFFINES["oblique"])
    predict(only, path, tmp_path / "plain.nii.gz", device="cpu", quiet=True)
    assert cli.main(["predict", str(only), str(path), str(tmp_path / "out"), "--device", "cpu", "--explain", "1", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["explained"]["a"]
    assert found["class"] == "ball" and found["voxels"] == (read(tmp_path / "out/a.nii.gz") == 1).sum()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("a.nii.gz", "a_explained.html", "a_integrated-gradients.nii.gz", "a_occlusion.nii.gz", "volumes.csv")
    ]
    np.testing.assert_array_equal(read(tmp_path / "out/a.nii.gz"), read(tmp_path / "plain.nii.gz"))
    for name in METHODS:
        back = nib.load(tmp_path / f"out/a_{name}.nii.gz")
        np.testing.assert_array_equal(back.affine, nib.load(path).affine)
        assert back.shape == SMALL and back.get_data_dtype() == np.float32 and np.isfinite(back.dataobj).all()
    assert f"a residue of {100 * found['integrated gradients']['residue_share']:.2g} %" in said.err
    assert found["reach"]["layers"] == []  # a U-Net of convolutions has no scans


def test_the_ball_depends_on_the_ball(only, tmp_path):
    image, label = volume(7)
    path = write(tmp_path / "a.nii.gz", image[..., 0])
    found = explained(only, path, tmp_path / "out")
    near = np.zeros(label.shape, bool)
    where = np.argwhere(label == 1)
    near[tuple(slice(max(0, a - 3), b + 4) for a, b in zip(where.min(0), where.max(0), strict=True))] = True
    for name in METHODS:
        values = read(tmp_path / f"out/a_{name}.nii.gz")
        assert np.abs(values[near]).mean() > 4 * np.abs(values[~near]).mean()
    gradients = found["integrated gradients"]
    assert gradients["residue_share"] < 0.05
    assert gradients["residue"] == pytest.approx(gradients["difference"] - gradients["sum"])
    written = read(tmp_path / "out/a_integrated-gradients.nii.gz")
    assert written.sum(dtype=float) == pytest.approx(gradients["sum"], rel=0.01)  # of spacing 1, as the network's
    assert found["occlusion"]["difference"] == pytest.approx(gradients["difference"], rel=1e-5)
    assert 0.5 < found["probability"] <= 1
    for name in ("integrated gradients", "occlusion"):
        fall = found["sanity"]["deletion"][name]
        assert fall["area"] < fall["random_area"], name
        assert fall["first"][0] == pytest.approx(found["probability"], abs=1e-5)
        assert max(map(abs, found["sanity"]["rank_correlation"][name].values())) < 1
    assert abs(found["sanity"]["rank_correlation"]["integrated gradients"]["values"]) < 0.5


@pytest.mark.thorough
def test_turning_the_axes_turns_the_maps(only, tmp_path):
    image = volume(7, SMALL)[0][..., 0]
    turned = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, turned.shape[0] - 1], [0, 0, 0, 1.0]])
    explained(only, write(tmp_path / "a.nii.gz", image), tmp_path / "one")
    with torch.no_grad():  # as a program may call it
        explained(only, write(tmp_path / "a.nii.gz", turned, affine), tmp_path / "other")
    for name in METHODS:
        one, other = (read(tmp_path / out / f"a_{name}.nii.gz") for out in ("one", "other"))
        np.testing.assert_allclose(one.transpose(2, 0, 1)[::-1], other, atol=1e-6)


@pytest.mark.thorough
def test_runs_are_averaged(only, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0])
    one = explained(only, path, tmp_path / "one")
    both = explained(only, path, tmp_path / "both", more_runs=[shutil.copytree(only, tmp_path / "copy")])
    for name in METHODS:
        np.testing.assert_allclose(read(tmp_path / f"both/a_{name}.nii.gz"), read(tmp_path / f"one/a_{name}.nii.gz"), atol=1e-7)
    assert both["integrated gradients"] == pytest.approx(one["integrated gradients"], rel=1e-5)


def test_another_spacing(only, tmp_path):
    coarse = shutil.copytree(only, tmp_path / "coarse")
    how = json.loads((coarse / "fitted.json").read_text())
    (coarse / "fitted.json").write_text(json.dumps({**how, "spacing": [1.3, 1.2, 1.1]}))
    image, label = volume(7, SMALL)
    explained(coarse, write(tmp_path / "a.nii.gz", image[..., 0], AFFINES["SPL"]), tmp_path / "out")
    ball = np.isin(read(tmp_path / "out/a.nii.gz"), 1) & (label == 1)
    values = np.abs(read(tmp_path / "out/a_integrated-gradients.nii.gz"))
    assert values.shape == SMALL and values[ball].mean() > 3 * values[label == 0].mean()


def test_what_the_scans_see(scans, tmp_path):
    image = volume(7, (32, 32, 32))[0]
    path = write(tmp_path / "a.nii.gz", image[..., 0], np.diag([-1, 1, 1, 1]))
    found = explained(scans, path, tmp_path / "out", explain_at=(-15.0, 12.0, 10.0))
    layers = found["reach"]["layers"]
    assert found["reach"]["target_mm"] == [-15, 12, 10] and [layer["shape"] for layer in layers] == [[8, 8, 8], [4, 4, 4], [4, 4, 4], [2, 2, 2]]
    for layer in layers:
        values = read(tmp_path / f"out/a_reach-{layer['layer']}.nii.gz")
        assert values.shape == (32, 32, 32, 6) and len(layer["orders"]) == 6 and (values >= 0).all()
        edges = np.array(layer["voxel_mm"])
        for i, order in enumerate(layer["orders"]):
            part = values[..., i]
            assert part.sum(dtype=float) == pytest.approx(1, abs=1e-4)
            away = np.linalg.norm(np.stack(np.meshgrid(*map(np.arange, part.shape), indexing="ij"), -1) - (15, 12, 10), axis=-1)
            far = order["within_mm"]["0.9"]
            assert part[away <= far + np.linalg.norm(edges)].sum() > 0.85
            assert 0 <= order["within_mm"]["0.5"] <= far <= np.linalg.norm(edges * layer["shape"])
            assert order["within_steps"]["0.9"] <= np.prod(layer["shape"])
    # The first two orders walk to the right and see what lies to the left, the fourth and fifth the other way round.
    first = read(tmp_path / f"out/a_reach-{layers[0]['layer']}.nii.gz")
    before, behind = first[15 + 8 :], first[: 15 - 8]  # the file's first axis runs to the left
    assert before[..., :2].any() and not before[..., 3:5].any()
    assert behind[..., 3:5].any() and not behind[..., :2].any()
    page = (tmp_path / "out/a_explained.html").read_text()
    assert page.count("reach of encoder.stages") >= 4 and "raster(axes=(0, 1, 2), reverse=True)" in page


@pytest.mark.thorough
def test_slices_channels_and_regions(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "box": [2]}
    root = nnunet_folder(tmp_path / "data", 2, (20, 18, 6), channels=("T1", "T2"), labels=labels)
    table = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**table, "regions_class_order": [1, 2]}))
    options = {"model": "medssm_unet", "model_kwargs": NETWORK, "spatial_dims": 2, "patch": (16, 16), "max_steps": 20, "lr": 0.01}
    train(root, tmp_path / "run", **options, device="cpu", quiet=True)
    found = explained(tmp_path / "run", root / "imagesTr/case_0_0000.nii.gz", tmp_path / "out", "whole")
    assert found["voxels"] == (read(tmp_path / "out/case_0.nii.gz") > 0).sum() > 0
    for name in METHODS:
        values = read(tmp_path / f"out/case_0_{name}.nii.gz")
        assert values.shape == (20, 18, 6, 2) and (np.abs(values).sum((0, 1, 2)) > 0).all()
    layer = found["reach"]["layers"][0]
    assert layer["shape"] == [4, 4] and read(tmp_path / f"out/case_0_reach-{layer['layer']}.nii.gz").shape == (20, 18, 6, 4)


def test_a_class_that_is_not_there_has_no_maps(only, tmp_path):
    path, target = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0]), write(tmp_path / "out/a.nii.gz", np.full(SMALL, 2, np.uint8))
    explainer = Explainer("ball", [Run(load(only), Fitted.load(only / "fitted.json"))], device=torch.device("cpu"))
    found = explainer(Case("a", (path,)), target)
    assert found == {"class": "ball", "voxels": 0} and len(list((tmp_path / "out").iterdir())) == 1
    assert summary("a", found) == "a: no voxel is labelled ball: there is nothing to explain"


def test_bad_input_is_one_line_and_nothing_is_written(only, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0])

    def refused(*words):
        assert cli.main(["predict", str(only), str(path), str(tmp_path / "out"), "--device", "cpu", "--quiet", *words]) == 2
        return capsys.readouterr().err

    assert "explain: expected one of ball (1), box (2), got zebra" in refused("--explain", "zebra")
    assert "--explain-at: expected 3 values, each a number" in refused("--explain", "ball", "--explain-at", "1", "2")
    monkeypatch.setattr("medssm.segment.explain.attribution.importlib.util.find_spec", lambda name: None)
    assert "explain: needs the package captum: pip install '.[explain]'" in refused("--explain", "ball")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for name in ("a_occlusion.nii.gz", "a_explained.html"):
        (tmp_path / "out" / name).write_text("mine")
        assert f"{name} is there already" in refused("--explain", "ball")
        assert (tmp_path / "out" / name).read_text() == "mine" and len(list((tmp_path / "out").iterdir())) == 1
        (tmp_path / "out" / name).unlink()
    write(tmp_path / "a_occlusion.nii.gz", volume(7, SMALL)[0][..., 0])
    assert cli.main(["predict", str(only), str(tmp_path), str(tmp_path / "out"), "--device", "cpu", "--quiet", "--explain", "ball"]) == 2
    assert "a_occlusion.nii.gz: expected one file of that name, got two" in capsys.readouterr().err
    assert "expected a point in the image, got 99 0 0 mm" in refused("--explain", "ball", "--explain-at", "99", "0", "0")


@pytest.mark.thorough
def test_without_the_option_nothing_changes_and_again_writes_over_its_own(only, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0])
    result = predict(only, path, tmp_path / "out", device="cpu", quiet=True)
    assert "explained" not in result and sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "volumes.csv"]
    first = explained(only, path, tmp_path / "out")
    assert explained(only, path, tmp_path / "out") == first  # the same numbers, in the place of the first ones


@needs_browser
def test_a_browser_shows_the_page(scans, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7, SMALL)[0][..., 0])
    explained(scans, path, tmp_path / "out")
    picture = screenshot(tmp_path / "out/a_explained.html", tmp_path, 1100, 1600).astype(int)
    red = (picture[..., 0] - picture[..., 2] > 80) & (picture[..., 0] > 120)
    white = (picture.min(-1) == 255) & (np.roll(picture, 3, 1).max(-1) < 200)
    assert red[250:700].sum() > 300 and white[250:700].sum() > 20, (red.sum(), white.sum())  # what speaks for it, and the outline
    assert not (tmp_path / "out/a_explained.html").read_text().count("http://")
