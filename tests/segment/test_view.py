"""medssm view: what the page holds, and what a real browser shows of it."""

import base64
import gzip
import importlib.util
import json
import re

import nibabel as nib
import numpy as np
import pytest

from medssm import cli
from medssm.errors import UserError
from medssm.segment import view as module
from medssm.segment.pages import COLOURS
from medssm.segment.view import NotInstalled, view
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import volume, write
from tests.segment.test_intensity import hounsfield

AFFINE = np.array([[-1.0, 0, 0, 12], [0, 1, 0, -3], [0, 0, 2, 5], [0, 0, 0, 1]])
needs_niivue = pytest.mark.skipif(importlib.util.find_spec("ipyniivue") is None, reason="ipyniivue is not installed")
pytestmark = needs_niivue


@pytest.fixture
def files(tmp_path):
    """A scan, a prediction and its reference; 60 voxels of the first plane differ."""
    image, label = volume(0)
    predicted = label.copy()
    predicted[0, :20, :3] = 2
    return [
        write(tmp_path / "scan.nii.gz", image[..., 0], AFFINE),
        write(tmp_path / "predicted.nii.gz", predicted, AFFINE),
        write(tmp_path / "drawn.nii.gz", label, AFFINE),
    ]


def shown(page) -> dict:
    """The data in a page, each volume as nibabel reads it."""
    table = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])
    for one in table["volumes"]:
        one["image"] = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(one["data"])))
    return table


def test_the_page_has_the_files_and_their_differences(files, tmp_path):
    result = view(*files, out=tmp_path / "page.html", classes={"background": 0, "zebra": 1, "box": 2, "9": 9})
    table = shown(tmp_path / "page.html")
    assert result["overlays"] == ["predicted", "drawn", "differences: 60 voxels"] and result["steps"] == [1, 1, 1]
    assert result["classes"] == {"background": 0, "zebra": 1, "box": 2, "9": 9}
    assert table["names"] == ["background", "zebra", "box", "9"] and table["colours"][1:] == list(COLOURS[:3])  # in the order of the values
    scan, predicted, drawn, differs = (one["image"] for one in table["volumes"])
    x, y, z = table["at"]
    assert np.asarray(predicted.dataobj)[::-1][x, y, z] > 0  # counted along the RAS axes, where the file's first one runs to the left
    np.testing.assert_allclose(scan.get_fdata(), nib.load(files[0]).get_fdata(), atol=0.01)
    np.testing.assert_array_equal(predicted.dataobj, nib.load(files[1]).dataobj)
    assert int(np.asarray(differs.dataobj).sum()) == 60 and np.asarray(drawn.dataobj).max() == 2
    for image in (scan, predicted, drawn, differs):
        np.testing.assert_array_equal(image.affine, AFFINE)


def test_a_region_of_several_values_names_none_of_them(files, tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2]}))
    result = view(*files, out=tmp_path / "page.html", classes=tmp_path / "dataset.json")
    assert result["classes"] == {"background": 0, "1": 1, "core": 2}


def test_windows_by_modality(tmp_path):
    ct = write(tmp_path / "ct.nii.gz", hounsfield(0).astype(np.int16))
    mr = write(tmp_path / "mr.nii.gz", volume(0)[0][..., 0])
    assert next(iter(view(ct, out=tmp_path / "a.html")["windows"].items())) == ("soft tissue", (-160, 240))
    own = view(mr, out=tmp_path / "b.html")["windows"]
    values = np.asarray(nib.load(mr).dataobj)
    assert list(own) == ["99 % of the voxels", "all"] and own["all"] == (values.min(), values.max())
    assert own["99 % of the voxels"] == pytest.approx(np.percentile(values, (0.5, 99.5)))
    assert "lung" in view(mr, out=tmp_path / "c.html", modality="ct")["windows"]
    assert "lung" not in view(ct, out=tmp_path / "d.html", modality="other")["windows"]


def test_a_large_scan_is_thinned_and_stays_in_its_place(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_VOXELS", 20_000)
    assert cli.main(["view", *map(str, files), "-o", str(tmp_path / "page.html")]) == 0
    assert "shown: every 2 x 2 x 1 th voxel" in capsys.readouterr().out
    image = shown(tmp_path / "page.html")["volumes"][1]["image"]
    np.testing.assert_array_equal(image.dataobj, np.asarray(nib.load(files[1]).dataobj)[::2, ::2])
    np.testing.assert_array_equal(image.affine, AFFINE @ np.diag([2, 2, 1, 1]))


def test_the_page_says_whose_the_viewer_is_and_may_load_nothing(files, tmp_path):
    view(*files, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "NiiVue (BSD 2-Clause licence)" in text and "Redistributions in binary form must reproduce" in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src &#39;none&#39;") or policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|\*", policy)


def test_what_cannot_be_shown(files, tmp_path, monkeypatch):
    other = write(tmp_path / "other.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(UserError, match=r"other.nii.gz: .*\(4, 4, 4\)"):
        view(files[0], other, out=tmp_path / "page.html")
    with pytest.raises(UserError, match=r"scan.nii.gz is a file that is read"):
        view(*files, out=files[0], overwrite=True)
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        view(*files, out=tmp_path / "mine.html")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"needs the package ipyniivue: pip install '\.\[view\]'"):
        view(*files, out=tmp_path / "page.html")
    assert sorted(file.name for file in tmp_path.glob("*.html")) == ["mine.html"]


def test_names_cannot_run_in_the_page(tmp_path):
    scan = write(tmp_path / "<b>&.nii", volume(0)[0][..., 0])
    label = write(tmp_path / "label.nii", volume(0)[1])
    view(scan, label, out=tmp_path / "page.html", classes={"background": 0, "</script><script>alert(1)": 1})
    text = (tmp_path / "page.html").read_text()
    assert "<b>&.nii" not in text and "<script>alert" not in text


@needs_browser
def test_a_browser_shows_four_panes(files, tmp_path):
    view(*files, out=tmp_path / "page.html", classes={"background": 0, "zebra": 1, "box": 2})
    picture = screenshot(tmp_path / "page.html", tmp_path).astype(int)
    assert picture.shape == (700, 900, 3)
    colour = picture - picture.min(-1, keepdims=True)  # without the grey below
    where = {}
    for name, code in zip(("ball", "box"), COLOURS, strict=False):
        wanted = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])
        wanted -= wanted.min()
        alike = (colour * wanted).sum(-1) / (np.linalg.norm(colour, axis=-1) * np.linalg.norm(wanted) + 1e-9)
        found = (alike > 0.98) & (colour.max(-1) > 20)
        where[name] = [int(part.sum()) for rows in np.array_split(found[66:], [374]) for part in np.array_split(rows, [461], axis=1)]
    assert all(ball + box > 1000 for ball, box in zip(where["ball"], where["box"], strict=True)), where  # the cross is in a class
    assert min(where["ball"][3], where["box"][3]) > 1000, where  # the rendering has both
    assert sum(where["ball"]) > 1.3 * sum(where["box"]), where  # each has its own colour: the ball is the larger one
    for pane in (picture[100:430, 240:450], picture[100:430, 470:660], picture[450:640, 240:450]):
        assert (pane.min(-1) > 30).mean() > 0.5  # the scan itself
