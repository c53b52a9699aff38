"""The scripts of docs/examples work: on the data set that they are about where it lies beside this folder, and on a small one of its form."""

import json
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("monai")

from medssm.segment.data import load_dataset, split
from medssm.segment.images import open_image
from medssm.segment.train import train
from tests.segment.brain import install
from tests.segment.synthetic import UNET

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "sunnybrook_lv.npz"
write = runpy.run_path(str(ROOT / "docs/examples/sunnybrook.py"))["write"]


def small(path: Path) -> Path:
    """Seven patients with three slices each."""
    random, rows = np.random.default_rng(0), np.arange(21)
    segs = (np.hypot(*np.mgrid[-16:16, -16:16]) < 8)[None].repeat(21, 0).astype(np.int32)
    images = (segs * 300 + random.integers(0, 50, (21, 32, 32))).astype(np.uint16)
    voxels = np.float32([[1.5, 1.25, 8]]).repeat(21, 0)
    np.savez(path, images=images, segs=segs, caseIndices=np.stack([rows[::3], rows[::3] + 3], 1), caseCat=rows // 12, caseVoxelSize=voxels)
    return path


def test_the_left_ventricle_is_trained_on_and_split_by_patients(tmp_path):
    source, out = small(tmp_path / "hearts.npz"), tmp_path / "Dataset002_LeftVentricle"
    assert len(write(source, out)) == 7
    with np.load(source) as data, Image.open(out / "imagesTr" / "patient01_slice02_0000.png") as found:
        assert np.array_equal(np.array(found), data["images"][5]) and found.mode == "I;16"
    image = open_image(out / "imagesTr" / "patient01_slice02_0000.png")
    assert image.spacing.tolist() == [1.5, 1.25, 8] and not image.notes
    check_splits(out, patients=7)
    result = train(
        out,
        tmp_path / "run",
        model="monai.networks.nets.UNet",
        model_kwargs=UNET,
        spatial_dims=2,
        patch=(32, 32),
        splits=out / "splits_final.json",
        fold=0,
        max_steps=2,
        device="cpu",
        quiet=True,
    )
    assert result["cases"] + result["validation_cases"] == 21 and result["spacing"] == [1.5, 1.25, 0]


@pytest.mark.thorough
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_the_real_hearts(tmp_path):
    cases = write(REAL, tmp_path / "data")
    assert len(cases) == 45 and sum(map(len, cases.values())) == 420
    table = check_splits(tmp_path / "data", patients=45)
    assert len(table.cases) == 420 and table.classes == {"background": 0, "ventricle": 1}
    assert 1.2 < open_image(table.cases[0].images[0]).spacing[0] < 1.6


def check_splits(out: Path, patients: int):
    """Each patient is held out once, and never trained on then."""
    table, held_out = load_dataset(out), []
    assert len(json.loads((out / "splits_final.json").read_text())) == 5
    for fold in range(5):
        training, validation = ({case.name.partition("_")[0] for case in part} for part in split(table, fold, splits=out / "splits_final.json"))
        assert not training & validation and len(training | validation) == patients
        held_out += validation
    assert len(held_out) == len(set(held_out)) == patients
    return table


def test_the_mirrored_brain_has_its_sides_exchanged(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path)
    classes = runpy.run_path(str(ROOT / "docs/examples/sides.py"))["write"](tmp_path / "sides", "synthetic")
    assert classes == {"background": 0, "left ball": 1, "right ball": 2, "left box": 3, "right box": 4}
    table = load_dataset(tmp_path / "sides")
    assert table.classes == classes and [case.name for case in table.cases] == ["brain"]
    images, labels = ({name: nib.load(tmp_path / "sides" / f"{kind}{name}.nii.gz") for name in names} for kind, names in FILES)
    for label in labels.values():
        values = np.asanyarray(label.dataobj)
        x = {value: nib.affines.apply_affine(label.affine, np.argwhere(values == value)).mean(0)[0] for value in classes.values() if value}
        assert x[1] < -10 and x[2] > 10 and x[3] < -10 and x[4] > 10  # left is left in both
    for files in (images, labels):
        brain, mirrored = (np.asanyarray(file.dataobj) for file in files.values())
        assert np.array_equal(np.flip(brain, 0) > 0, mirrored > 0) and not np.array_equal(brain, mirrored)


FILES = (("images", ("Tr/brain_0000", "Ts/mirrored_0000")), ("labels", ("Tr/brain", "Ts/mirrored")))
