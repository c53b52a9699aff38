"""Pictures, NRRD and DICOM through train, predict and evaluate: each label map in the format of its image or in the one that is asked for."""

import hashlib
import json

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image as Pillow

from medssm import cli
from medssm.errors import UserError
from medssm.segment.data import load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.images import open_image, read_label, write_image
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.dicom import series
from tests.segment.synthetic import UNET, nnunet_folder, volume
from tests.segment.test_formats import itk_image, same_places

FAST = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "max_steps": 1, "device": "cpu", "quiet": True}
SCAN = volume(5, (18, 17, 16))[0][..., 0].T  # z, y, x


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """images/ and masks/ of three pictures in colour, of different sizes, with a bright disc each."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir(), (root / "masks").mkdir()
    for i in range(3):
        rows, columns = np.mgrid[: 40 + i, : 30 + 2 * i]
        disc = (rows - 20) ** 2 + (columns - 12 - i) ** 2 < 64
        data = np.random.default_rng(i).normal(60 + 120 * disc[..., None], 10, (*disc.shape, 3)).clip(0, 255).astype(np.uint8)
        Pillow.fromarray(data).save(root / "images" / f"p{i}.{'jpg' if i == 2 else 'png'}")
        Pillow.fromarray(disc.astype(np.uint8) * 255).save(root / "masks" / f"p{i}.png")
    return root


@pytest.fixture(scope="module")
def flat(photographs, tmp_path_factory):
    """A network for them."""
    out = tmp_path_factory.mktemp("flat")
    train(photographs, out / "run", spatial_dims=2, patch=(32, 32), **(FAST | {"max_steps": 40, "lr": 0.01}))
    return out / "run"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A network for volumes of one channel."""
    out = tmp_path_factory.mktemp("deep")
    train(nnunet_folder(out / "data", cases=1, shape=(16, 16, 16)), out / "run", patch=(16, 16, 16), **FAST)
    return out / "run"


def test_a_picture_gives_a_png_of_its_size(flat, photographs, tmp_path, capsys):
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in photographs.rglob("*.*")}
    assert cli.main(["predict", str(flat), str(photographs / "images"), str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert said.count("p0.png: PNG, 30 x 40 x 1 voxels of 1 x 1 x 1 mm; the file does not say how large a pixel is: 1 x 1 mm") == 1
    assert said.count("p2.jpg: JPEG, 34 x 42 x 1 voxels") == 1 and "p1.png" not in said  # each format once
    for i in range(3):
        with Pillow.open(tmp_path / "out" / f"p{i}.png") as found:
            assert found.size == (30 + 2 * i, 40 + i) and found.mode == "L" and set(np.unique(np.array(found))) <= {0, 255}
    result = evaluate(tmp_path / "out", photographs / "masks", quiet=True)
    assert result["mean"]["dice"]["mean"] > 0.7 and not result["failed"]
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in photographs.rglob("*.*")}


def test_a_label_map_that_is_there_is_measured_by_the_pixels_of_its_picture(flat, photographs, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p0.png").write_bytes((photographs / "images" / "p0.png").read_bytes())
    (tmp_path / "in" / "p0.json").write_text(json.dumps({"spacing": [2.0, 2.0]}))
    predict(flat, tmp_path / "in", tmp_path / "out", device="cpu", quiet=True)
    Pillow.fromarray(np.full((40, 30), 255, np.uint8)).save(tmp_path / "out" / "p0.png")
    result = predict(flat, tmp_path / "in", tmp_path / "out", device="cpu", skip_existing=True, quiet=True)
    assert result["skipped"] == ["p0"] and result["volumes"]["p0"]["class_255"] == {"voxels": 1200, "ml": pytest.approx(4.8)}


@pytest.mark.parametrize(("out", "format"), [("a.png", None), ("a.tif", None), ("a.nii.gz", None), ("a", "nifti")])
def test_the_name_or_an_option_says_the_format(flat, photographs, tmp_path, out, format):
    result = predict(flat, photographs / "images" / "p0.png", tmp_path / out, format=format, device="cpu", quiet=True)
    file = tmp_path / (f"{out}/p0.nii.gz" if format else out)
    assert result["cases"] == {"p0": str(file)}
    assert read_label(file, open_image(photographs / "images" / "p0.png"))[0].shape == (30, 40, 1)


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("out.jpg", None, r"out\.jpg: JPEG changes values"),
        ("out.dcm", None, r"out\.dcm: a DICOM-SEG belongs to DICOM images"),
        ("out", "dicom-seg", r"p0\.dcm: a DICOM-SEG belongs to DICOM images"),
        ("out.png", "tiff", r"format: expected a name that ends in \.tif, got .*out\.png"),
        ("out.bmp", None, r"out: expected a file that ends in \.nii\.gz, \.nrrd, \.mha, \.png, \.tif, \.dcm, or a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_predicted(flat, photographs, tmp_path, monkeypatch, name, format, message):
    monkeypatch.setattr("medssm.segment.predict.stored_probabilities", lambda *arguments, **options: pytest.fail("predicted"))
    with pytest.raises(UserError, match=message):
        predict(flat, photographs / "images" / "p0.png", tmp_path / name, format=format, device="cpu", quiet=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha"])
def test_itks_formats_come_back_as_they_came(deep, tmp_path, name):
    (tmp_path / "in").mkdir()
    sitk.WriteImage(itk_image(SCAN), str(tmp_path / "in" / name))
    predict(deep, tmp_path / "in", tmp_path / "out", device="cpu", save_probabilities=True, quiet=True)
    same_places(open_image(tmp_path / "in" / name), sitk.ReadImage(str(tmp_path / "out" / name)))
    assert open_image(tmp_path / "out" / "scan_probabilities.nii.gz").channels == 3


@pytest.mark.parametrize("format", [None, "dicom-seg"])
def test_a_series_gives_nifti_or_dicom_seg_in_place(deep, tmp_path, capsys, format):
    folder = series(tmp_path / "ct", SCAN.astype(np.int16))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = [] if format is None else ["--format", format]
    assert cli.main(["predict", str(deep), str(folder), str(tmp_path / "out"), "--device", "cpu", *options]) == 0
    assert f"{folder}: DICOM, 18 x 17 x 16 voxels of 0.5 x 0.7 x 2 mm\n" in capsys.readouterr().err
    file = tmp_path / "out" / ("ct.dcm" if format else "ct.nii.gz")
    assert read_label(file, open_image(folder))[0].shape == (18, 17, 16)
    if not format:
        same_places(open_image(folder), sitk.ReadImage(str(file)))
    if format:
        assert [segment.SegmentLabel for segment in pydicom.dcmread(file).SegmentSequence] == ["ball", "box"]
        assert evaluate(tmp_path / "out", tmp_path / "out", quiet=True)["mean"]["dice"]["mean"] in (1, None)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_written_into_a_series(deep, tmp_path, overwrite):
    folder = series(tmp_path / "ct", SCAN.astype(np.int16))
    (folder / "IM000").rename(folder / "IM000.dcm")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"out: .*ct is the folder of a DICOM series, which is read"):
        predict(deep, folder, folder, device="cpu", overwrite=overwrite, quiet=True)
    with pytest.raises(UserError, match=r"out: .*IM000\.dcm is a file that is read; name another one"):
        predict(deep, folder, folder / "IM000.dcm", device="cpu", overwrite=overwrite, quiet=True)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_datalist_may_name_series_and_label_maps_in_dicom(tmp_path):
    """Trained on a folder of DICOM with a NIfTI label map, and on one with a DICOM-SEG."""
    entries = []
    for name, ending in (("a", "nii.gz"), ("b", "dcm")):
        folder = series(tmp_path / name, SCAN.astype(np.int16))
        write_image(tmp_path / f"{name}-label.{ending}", volume(5, (18, 17, 16))[1], open_image(folder), {"background": 0, "ball": 1, "box": 2})
        entries.append({"image": name, "label": f"{name}-label.{ending}"})
    (tmp_path / "list.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "training": entries}))
    assert load_dataset(tmp_path / "list.json").classes == {"background": 0, "class_1": 1, "class_2": 2}
    result = train(tmp_path / "list.json", tmp_path / "run", patch=(16, 16, 16), **FAST)
    assert result["cases"] == 2 and result["spacing"] == pytest.approx([0.5, 0.7, 2.0])
