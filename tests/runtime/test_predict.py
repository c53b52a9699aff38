"""medssm_runtime gives the label map of medssm predict, but for voxels whose two largest probabilities are nearly one."""

import nibabel as nib
import numpy as np
import pytest

import medssm_runtime
from medssm.segment.inference import OVERLAP
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import Regions
from tests.runtime.runs import network_of, write_onnx, write_run
from tests.segment.synthetic import volume, write

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OBLIQUE = [[0.9, -0.3, 0, 4], [0.3, 0.9, 0.1, 5], [0, -0.1, 1.1, 6], [0, 0, 0, 1.0]]
TURNED = [[0, 0, -2.0, 1], [0, -0.8, 0, 2], [0.8, 0, 0, 3], [0, 0, 0, 1.0]]
SHEARED = [[1.0, 0.0, 0.25, 4], [0, 1.0, 0.1, 5], [0, 0, 1.5, 6], [0, 0, 0, 1.0]]
CT = {"scheme": "ct", "low": 20.0, "high": 170.0, "mean": 90.0, "deviation": 40.0}
NOTHING = np.eye(4)


def padded(image):
    """A scan with padding such as -3024 outside of the field of view."""
    image = image - 50
    image[:4] = -3024
    return image


CASES = {
    "as it is": (NOTHING, {}, {}),
    "anisotropic": (np.diag([1.5, 0.7, 2.5, 1]), {"spacing": (1.0, 1.1, 1.6), "patch": (16, 24, 12)}, {}),
    "oblique": (OBLIQUE, {"spacing": (1.2, 1.0, 0.9)}, {}),
    "flipped": (TURNED, {"spacing": (1.0, 1.0, 1.5)}, {}),
    "sheared": (SHEARED, {"spacing": (1.1, 1.1, 1.1)}, {}),
    "nearly orthogonal": ([[1, 4e-4, 0, 0], [0, 1, 4e-4, 0], [-4e-4, 0, 1, 0], [0, 0, 0, 1]], {}, {}),
    "nearly the spacing": (np.diag([1.0005, 1, 1, 1]), {}, {}),
    "CT": (NOTHING, {"channels": ("CT",), "intensity": (CT,)}, {}),
    "padding": (NOTHING, {}, {"edit": padded}),
    "several channels": (OBLIQUE, {"channels": ("CT", "T1", "mask"), "intensity": (CT, {"scheme": "zscore"}, {"scheme": "none"})}, {}),
    "values of classes": (NOTHING, {"classes": {"background": 0, "ball": 5, "box": 300}}, {}),
    "regions": (NOTHING, {"regions": Regions({"whole": (1, 2), "core": (2,)}, (1, 2)), "mirror": (0, 2)}, {"mirror": True}),
    "2D": (TURNED, {"patch": (16, 20), "slice_axis": 2, "spacing": (1.0, 1.0, 0.0), "mirror": (0, 1)}, {"mirror": True}),
    "2D across x": (NOTHING, {"patch": (16, 20), "slice_axis": 0}, {}),
    "patch larger than the volume": (NOTHING, {"patch": (32, 16, 48)}, {"shape": (19, 20, 21)}),
    "mirrored": (NOTHING, {"mirror": (0, 1, 2), "patch": (24, 24, 24)}, {"mirror": True}),
    "sides change places": (NOTHING, {"mirror": (0, 1), "sides": ((1, 2),)}, {"mirror": True}),
    "overlap": (NOTHING, {}, {"overlap": 0.3}),
    "post-processing": (
        np.diag([2.0, 2.0, 1.0, 1]),
        {"spacing": (2.0, 2.0, 2.0)},
        {"steps": {"box": {"smallest_ml": 0.03, "fill_holes": True}, "ball": {"largest_component": True}}},
    ),
    "post-processing of regions": (
        NOTHING,
        {"regions": Regions({"whole": (1, 2), "core": (2,)}, (1, 2))},
        {"steps": {"whole": {"fill_holes": True}, "core": {"largest_component": True}}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_predict(name, tmp_path):
    affine, settings, more = CASES[name]
    run = write_run(tmp_path / "run", more.get("steps"), **settings)
    fitted = Fitted.load(run / "fitted.json")
    mirror, overlap = more.get("mirror", False), more.get("overlap", OVERLAP)
    image = more.get("edit", lambda image: image)(volume(3, more.get("shape", (30, 26, 22)), len(fitted.channels))[0])
    for i in range(len(fitted.channels)):
        write(tmp_path / "scans" / f"case_{i:04d}.nii.gz", image[..., i], affine)
    predict(
        run,
        tmp_path / "scans",
        tmp_path / "a",
        model=network_of(fitted),
        mirror=mirror,
        overlap=overlap,
        save_probabilities=True,
        device="cpu",
        quiet=True,
    )
    file = write_onnx(run, tmp_path / "model.onnx", mirror=mirror, overlap=overlap)
    result = medssm_runtime.predict(file, tmp_path / "scans", tmp_path / "b", threads=1, quiet=True)
    assert list(result["cases"]) == ["case"] and not result["failed"]
    expected, found = (nib.load(tmp_path / folder / "case.nii.gz") for folder in "ab")
    assert found.get_data_dtype() == expected.get_data_dtype() and found.shape == expected.shape
    assert np.array_equal(found.affine, expected.affine) and found.header["descrip"] == expected.header["descrip"]
    expected, found = (np.asarray(one.dataobj) for one in (expected, found))
    different = expected != found
    probabilities = np.asarray(nib.load(tmp_path / "a" / "case_probabilities.nii.gz").dataobj)
    ranked = np.sort(probabilities, -1)
    tie = abs(probabilities - 0.5).min(-1) < 1e-4 if fitted.regions else ranked[..., -1] - ranked[..., -2] < 1e-4
    assert different.mean() < 1e-4 and tie[different].all()
    counts = np.bincount(expected.ravel().astype(int))
    assert (counts > 0).sum() > 1, counts  # there is something to agree on
    if steps := more.get("steps"):
        assert steps and (medssm_runtime_raw(file, tmp_path, image, affine) != found).any()  # the steps change something


def medssm_runtime_raw(file, folder, image, affine):
    """The label map without post-processing."""
    network = medssm_runtime.load(file)
    network.settings.postprocessing.clear()
    return network.segment(np.moveaxis(image, -1, 0), np.asarray(affine, float))
