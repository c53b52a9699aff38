"""medssm predict --explain: maps on the input's grid, figures, a page, and what cannot be explained."""

import importlib.util
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm import cli
from medssm.segment.explain import maps
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import nnunet_folder, volume, write
from tests.segment.test_predict import AFFINES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")
METHODS = ("integrated-gradients", "occlusion")


@pytest.fixture(autouse=True)
def few_boxes(monkeypatch):
    monkeypatch.setattr(maps, "_BOXES", 27)


@pytest.fixture(scope="module")
def scans(folder, tmp_path_factory):
    """A folder of medssm_unet's weights, hardly trained, and what it predicts for a scan with --explain."""
    root = tmp_path_factory.mktemp("scans")
    train(folder, root / "run", size="tiny", patch=(32, 32, 32), max_steps=12, lr=0.01, device="cpu", quiet=True)
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
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0], AFFINES["oblique"])
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
        assert back.shape == (40, 36, 32) and back.get_data_dtype() == np.float32 and np.isfinite(back.dataobj).all()
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
        assert -1 <= found["sanity"]["rank_correlation"][name] < 0.9


def test_turning_the_axes_turns_the_maps(only, tmp_path):
    image = volume(7)[0][..., 0]
    turned = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, turned.shape[0] - 1], [0, 0, 0, 1.0]])
    explained(only, write(tmp_path / "a.nii.gz", image), tmp_path / "one")
    explained(only, write(tmp_path / "a.nii.gz", turned, affine), tmp_path / "other")
    for name in METHODS:
        one, other = (read(tmp_path / out / f"a_{name}.nii.gz") for out in ("one", "other"))
        np.testing.assert_allclose(one.transpose(2, 0, 1)[::-1], other, atol=1e-6)


def test_another_spacing_and_folds(trained, tmp_path):
    coarse = shutil.copytree(trained / "fold_1", tmp_path / "coarse")
    how = json.loads((coarse / "fitted.json").read_text())
    (coarse / "fitted.json").write_text(json.dumps({**how, "spacing": [1.3, 1.2, 1.1]}))
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    parts = [explained(run, path, tmp_path / run.name) for run in (trained / "fold_0", coarse)]
    both = explained([trained / "fold_0", coarse], path, tmp_path / "both")
    label = read(tmp_path / "both/a.nii.gz")
    assert (label == read(tmp_path / "fold_0/a.nii.gz")).mean() > 0.99  # what is explained is what the mean of both found
    for name in METHODS:
        first, second, mean = (read(tmp_path / out / f"a_{name}.nii.gz") for out in ("fold_0", "coarse", "both"))
        assert np.corrcoef(mean.ravel(), ((first + second) / 2).ravel())[0, 1] > 0.95
    assert both["integrated gradients"]["difference"] == pytest.approx(np.mean([one["integrated gradients"]["difference"] for one in parts]), rel=0.2)


def test_what_the_scans_see(scans, tmp_path):
    image = volume(7)[0]
    path = write(tmp_path / "a.nii.gz", image[..., 0], np.diag([-1, 1, 1, 1]))
    found = explained(scans, path, tmp_path / "out", explain_at=(-15.0, 12.0, 10.0))
    layers = found["reach"]["layers"]
    assert found["reach"]["target_mm"] == [-15, 12, 10] and [layer["shape"] for layer in layers] == [[8, 8, 8], [4, 4, 4], [4, 4, 4], [2, 2, 2]]
    for layer in layers:
        values = read(tmp_path / f"out/a_reach-{layer['layer']}.nii.gz")
        assert values.shape == (40, 36, 32, 6) and len(layer["orders"]) == 6 and (values >= 0).all()
        edges = np.array(layer["voxel_mm"])
        for i, order in enumerate(layer["orders"]):
            part = values[..., i]
            assert part.sum(dtype=float) == pytest.approx(1, abs=0.02)  # a share, of a window inside the image
            away = np.linalg.norm(np.stack(np.meshgrid(*map(np.arange, part.shape), indexing="ij"), -1) - (15, 12, 10), axis=-1)
            far = order["within_mm"]["0.9"]
            assert part[away <= far + np.linalg.norm(edges)].sum() > 0.85
            assert 0 <= order["within_mm"]["0.5"] <= far <= np.linalg.norm(edges * layer["shape"])
            assert order["within_steps"]["0.9"] <= np.prod(layer["shape"])
    # Each of the first three orders sees what comes before the target, the other three what comes behind it.
    first = read(tmp_path / f"out/a_reach-{layers[0]['layer']}.nii.gz")
    middle = [15, 12, 10]
    assert first[: middle[0] - 8 :, :, :, 0].sum() == 0 or first[middle[0] + 8 :, :, :, 0].sum() == 0
    page = (tmp_path / "out/a_explained.html").read_text()
    assert page.count("reach of encoder.stages") >= 4 and "raster(axes=(0, 1, 2), reverse=True)" in page


def test_slices_channels_and_regions(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "box": [2]}
    root = nnunet_folder(tmp_path / "data", 3, (20, 18, 12), channels=("T1", "T2"), labels=labels)
    table = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**table, "regions_class_order": [1, 2]}))
    options = {"model": "medssm_unet", "model_kwargs": {"size": "tiny"}, "spatial_dims": 2, "patch": (16, 16), "max_steps": 40, "lr": 0.01}
    train(root, tmp_path / "run", **options, device="cpu", quiet=True)
    found = explained(tmp_path / "run", root / "imagesTr/case_0_0000.nii.gz", tmp_path / "out", "whole")
    assert found["voxels"] == (read(tmp_path / "out/case_0.nii.gz") > 0).sum() > 0
    for name in METHODS:
        values = read(tmp_path / f"out/case_0_{name}.nii.gz")
        assert values.shape == (20, 18, 12, 2) and (np.abs(values).sum((0, 1, 2)) > 0).all()
    layer = found["reach"]["layers"][0]
    assert layer["shape"] == [4, 4] and read(tmp_path / f"out/case_0_reach-{layer['layer']}.nii.gz").shape == (20, 18, 12, 4)


def test_a_class_that_is_not_there_has_no_maps(only, tmp_path, capsys):
    image = np.random.default_rng(0).normal(100, 1, (40, 36, 32)).astype(np.float32)
    path = write(tmp_path / "a.nii.gz", image)
    result = predict(only, path, tmp_path / "out", device="cpu", explain="box")
    if (read(tmp_path / "out/a.nii.gz") == 2).any():
        pytest.skip("the network finds a box in noise")
    assert result["explained"]["a"] == {"class": "box", "voxels": 0}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "volumes.csv"]
    assert "a: no voxel is labelled box: there is nothing to explain" in capsys.readouterr().err


def test_bad_input_is_one_line_and_nothing_is_written(only, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])

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
    assert "expected a point in the image, got 99 0 0 mm" in refused("--explain", "ball", "--explain-at", "99", "0", "0")


def test_without_the_option_nothing_changes_and_again_writes_over_its_own(only, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    result = predict(only, path, tmp_path / "out", device="cpu", quiet=True)
    assert "explained" not in result and sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "volumes.csv"]
    first = explained(only, path, tmp_path / "out")
    assert explained(only, path, tmp_path / "out") == first  # the same numbers, in the place of the first ones


def test_weights_keep_no_gradients_and_outputs_no_graph(only, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    with torch.no_grad():  # as a program may call it
        explained(only, path, tmp_path / "out")


@needs_browser
def test_a_browser_shows_the_page(scans, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    explained(scans, path, tmp_path / "out")
    picture = screenshot(tmp_path / "out/a_explained.html", tmp_path, 1100, 1600).astype(int)
    red = (picture[..., 0] - picture[..., 2] > 80) & (picture[..., 0] > 120)
    white = (picture.min(-1) == 255) & (np.roll(picture, 3, 1).max(-1) < 200)
    assert red[250:700].sum() > 300 and white[250:700].sum() > 20, (red.sum(), white.sum())  # what speaks for it, and the outline
    assert not (tmp_path / "out/a_explained.html").read_text().count("http://")
