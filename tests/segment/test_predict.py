"""medssm predict: any geometry in and back, folds averaged, bad files in one clear line."""

import json
import resource
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm import cli
from medssm.errors import UserError
from medssm.segment.images import read_label
from medssm.segment.inference import probabilities
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from medssm.segment.train import train
from tests.segment.synthetic import UNET, nnunet_folder, volume, write

TINY = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "max_steps": 1, "device": "cpu", "quiet": True}
AFFINES = {
    "RAS": np.eye(4),
    "LAS": np.array([[-1, 0, 0, 20], [0, 1, 0, -3], [0, 0, 1, 5], [0, 0, 0, 1.0]]),
    "SPL": np.array([[0, 0, -1, 1], [0, -1, 0, 2], [1, 0, 0, 3], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.9, -0.3, 0, 4], [0.3, 0.9, 0.1, 5], [0, -0.1, 1.1, 6], [0, 0, 0, 1.0]]),
}


def dice(found, truth):
    return [2 * ((found == i) & (truth == i)).sum() / max(1, (found == i).sum() + (truth == i).sum()) for i in (1, 2)]


@pytest.fixture
def only(trained):
    return trained / "fold_0"


@pytest.mark.parametrize("name", AFFINES)
def test_any_orientation_comes_back_on_its_own_grid(only, tmp_path, name):
    image, label = volume(7)
    path = write(tmp_path / "a.nii.gz", image[..., 0], AFFINES[name])
    predict(only, path, tmp_path / "out.nii.gz", device="cpu", quiet=True)
    back = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.affine, nib.load(path).affine)
    assert back.shape == image.shape[:3] and back.get_data_dtype() == np.uint8
    assert min(dice(np.asarray(back.dataobj), label)) > 0.85


def test_half_precision_finds_the_same_labels(only, tmp_path):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    for precision in ("32-true", "bf16-mixed"):
        predict(only, path, tmp_path / precision, precision=precision, device="cpu", save_probabilities=True, quiet=True)
    one, other = (np.asanyarray(nib.load(tmp_path / p / "a_probabilities.nii.gz").dataobj) for p in ("32-true", "bf16-mixed"))
    assert 0 < np.abs(one - other).max() < 0.1 and (one.argmax(-1) == other.argmax(-1)).mean() > 0.995


def test_an_unknown_precision_is_one_line(only, tmp_path, capsys):
    path = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0])
    assert cli.main(["predict", str(only), str(path), str(tmp_path / "out"), "--precision", "half"]) == 2
    assert "--precision: expected one of auto, 32-true, bf16-mixed, 16-mixed, got 'half'" in capsys.readouterr().err


def test_turning_the_axes_turns_the_result_and_nothing_else(only, tmp_path):
    image, _ = volume(7)
    first = write(tmp_path / "a.nii.gz", image[..., 0])
    turned = np.ascontiguousarray(image[..., 0].transpose(2, 0, 1)[::-1])
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, turned.shape[0] - 1], [0, 0, 0, 1.0]])
    second = write(tmp_path / "b.nii.gz", turned, affine)
    for path in (first, second):
        predict(only, path, tmp_path / f"out_{path.name}", device="cpu", quiet=True)
    one, other = (read_label(tmp_path / f"out_{path.name}")[0] for path in (first, second))
    np.testing.assert_array_equal(one.transpose(2, 0, 1)[::-1], other)


def test_thick_slices_come_back_on_their_own_grid(only, tmp_path):
    image, label = volume(7)
    path = write(tmp_path / "a.nii.gz", image[:, :, ::3, 0], np.diag([1, 1, 3.0, 1]))
    predict(only, path, tmp_path / "out.nii.gz", device="cpu", quiet=True)
    found, file = read_label(tmp_path / "out.nii.gz")
    assert found.shape == (40, 36, 11) and file.spacing.tolist() == [1, 1, 3]
    assert dice(found, label[:, :, ::3])[0] > 0.7


def test_a_volume_smaller_than_the_patch(only, tmp_path):
    image, _ = volume(7, shape=(20, 36, 10))
    predict(only, write(tmp_path / "a.nii.gz", image[..., 0]), tmp_path / "out.nii.gz", device="cpu", quiet=True)
    assert read_label(tmp_path / "out.nii.gz")[0].shape == (20, 36, 10)


def test_a_folder_by_the_command(trained, folder, tmp_path, capsys):
    assert cli.main(["predict", str(trained), str(folder / "imagesTr"), str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["cases"]) == [f"case_{i}" for i in range(4)] and not result["failed"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [*(f"case_{i}.nii.gz" for i in range(4)), "volumes.csv"]
    assert min(dice(read_label(tmp_path / "out/case_0.nii.gz")[0], read_label(folder / "labelsTr/case_0.nii.gz")[0])) > 0.9


def saved(weights, path, out, **options):
    predict(weights, path, out / "a.nii.gz", device="cpu", save_probabilities=True, quiet=True, **options)
    return np.asarray(nib.load(out / "a_probabilities.nii.gz").dataobj)


def test_folds_are_averaged_as_probabilities(trained, folder, tmp_path):
    path = folder / "imagesTr/case_2_0000.nii.gz"
    one, other = (saved(trained / f"fold_{i}", path, tmp_path / str(i)) for i in range(2))
    both = saved(trained, path, tmp_path / "both")
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    np.testing.assert_allclose(both.sum(-1), 1, atol=1e-5)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(read_label(tmp_path / "both/a.nii.gz")[0], both.argmax(-1))
    np.testing.assert_array_equal(saved([trained / "fold_0", trained / "fold_1"], path, tmp_path / "list"), both)


def test_folds_of_different_spacing_are_averaged_on_the_inputs_grid(trained, folder, tmp_path):
    path = folder / "imagesTr/case_2_0000.nii.gz"
    coarse = shutil.copytree(trained / "fold_1", tmp_path / "coarse")
    fitted = json.loads((coarse / "fitted.json").read_text())
    (coarse / "fitted.json").write_text(json.dumps({**fitted, "spacing": [1.3, 1.2, 1.1]}))
    one, other = (saved(fold, path, tmp_path / fold.name) for fold in (trained / "fold_0", coarse))
    np.testing.assert_allclose(saved([trained / "fold_0", coarse], path, tmp_path / "both"), (one + other) / 2, atol=1e-6)


def test_mirroring_averages_over_all_mirrorings(trained):
    """A network that looks at one side of a voxel sees both through mirroring."""

    class Left(torch.nn.Module):
        def forward(self, x):
            return torch.cat([torch.zeros_like(x), x.roll(1, 2)], 1)

    fitted = Fitted(("MR",), (1, 1, 1), ({"scheme": "none"},), {"background": 0, "bright": 1}, None, (8, 8, 8), mirror=(0, 2))
    image = torch.zeros(1, 8, 8, 8)
    image[0, 4, 4, 4] = 10
    found = probabilities(Left(), image, fitted, device=torch.device("cpu"), mirror=True)[1]
    plain = probabilities(Left(), image, fitted, device=torch.device("cpu"))[1]
    assert plain[5, 4, 4] > 0.99 and plain[3, 4, 4] == 0.5
    torch.testing.assert_close(found[5, 4, 4], found[3, 4, 4])
    torch.testing.assert_close(found[5, 4, 4], (plain[5, 4, 4] + 0.5) / 2)


def test_windows_of_a_network_without_context_do_not_show(tmp_path):
    """Stitched from overlapping windows, the result is the one that the whole volume would give."""
    layer = torch.nn.Conv3d(1, 2, 1)
    fitted = Fitted(("MR",), (1, 1, 1), ({"scheme": "zscore"},), {"background": 0, "bright": 1}, None, (8, 6, 5))
    image = torch.randn(1, 19, 14, 5)
    shown = []
    found = probabilities(layer, image, fitted, device=torch.device("cpu"), show=shown.append)
    scaled = (image - image.mean()) / image.std(correction=0)
    torch.testing.assert_close(found, layer(scaled[None])[0].softmax(0).detach(), atol=1e-5, rtol=0)
    assert shown[-1] == 1.0 and shown == sorted(shown)


def test_values_of_the_classes_come_back(tmp_path):
    labels = {"background": 0, "ball": 10, "box": 300}
    folder = nnunet_folder(
        tmp_path / "data",
        cases=1,
        shape=(16, 16, 16),
        labels=labels,
        edit=lambda seed, image, label: (image, np.array([0, 10, 300], np.int16)[label]),
    )
    train(folder, tmp_path / "w", **TINY)
    predict(tmp_path / "w", folder / "imagesTr/case_0_0000.nii.gz", tmp_path / "out.nii.gz", device="cpu", quiet=True)
    found, _ = read_label(tmp_path / "out.nii.gz")
    assert set(np.unique(found)) <= {0, 10, 300} and found.dtype == np.uint16


@pytest.mark.parametrize("shape", [(36, 40, 7), (36, 40)])
def test_a_2d_network_segments_slices_and_planes(tmp_path, shape):
    def plane(seed, image, label):
        return (image, label) if len(shape) == 3 else (image[:, :, 10:11], label[:, :, 10:11])

    affine = np.diag([1, 1, 4.0, 1])
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=(*shape, 20)[:3], affine=affine, edit=plane)
    train(folder, tmp_path / "w", **{**TINY, "spatial_dims": 2, "patch": (32, 32), "batch": 2})
    image = np.asarray(nib.load(folder / "imagesTr/case_0_0000.nii.gz").dataobj).reshape(shape)
    predict(tmp_path / "w", write(tmp_path / "a.nii.gz", image, affine), tmp_path / "out.nii.gz", device="cpu", quiet=True)
    assert nib.load(tmp_path / "out.nii.gz").shape == shape


def test_two_channels_as_files_and_as_a_fourth_axis(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=(16, 16, 16), channels=("T1", "T2"))
    train(folder, tmp_path / "w", **TINY)
    image, _ = volume(0, (16, 16, 16), 2)
    one = saved(tmp_path / "w", folder / "imagesTr/case_0_0000.nii.gz", tmp_path / "one")
    np.testing.assert_allclose(saved(tmp_path / "w", write(tmp_path / "b.nii.gz", image), tmp_path / "other"), one, atol=1e-6)
    (folder / "imagesTr/case_0_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_0_0001\.nii\.gz: no such file"):
        saved(tmp_path / "w", folder / "imagesTr/case_0_0000.nii.gz", tmp_path / "two")


def test_one_bad_file_does_not_stop_the_others(only, folder, tmp_path, capsys):
    shutil.copy(folder / "imagesTr/case_0_0000.nii.gz", tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:-500])
    assert cli.main(["predict", str(only), str(tmp_path), str(tmp_path / "out"), "--device", "cpu", "--quiet"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "bad.nii.gz: truncated or corrupt" in shown
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["good.nii.gz", "volumes.csv"]


def test_a_module_that_was_given_is_asked_for_again(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=(16, 16, 16))
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    train(folder, tmp_path / "w", model=network, patch=(16, 16, 16), max_steps=2, device="cpu", quiet=True)
    image = folder / "imagesTr/case_0_0000.nii.gz"
    with pytest.raises(UserError, match=r"trained from a torch\.nn\.modules\.conv\.Conv3d given as a module: pass it as model"):
        saved(tmp_path / "w", image, tmp_path / "out")
    assert saved(tmp_path / "w", image, tmp_path / "out", model=torch.nn.Conv3d(1, 3, 3, padding=1)).shape == (16, 16, 16, 3)
    with pytest.raises(UserError, match="does not fit the network"):
        saved(tmp_path / "w", image, tmp_path / "out", model=torch.nn.Conv3d(1, 3, 5, padding=2))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_our_own_network(tmp_path, spatial_dims):
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=(16, 16, 16))
    kwargs = {"size": "tiny", "deep_supervision": True}
    train(
        folder,
        tmp_path / "w",
        **{**TINY, "model": "medssm_unet", "model_kwargs": kwargs, "spatial_dims": spatial_dims, "patch": (16,) * spatial_dims, "batch": 1},
    )
    found = saved(tmp_path / "w", folder / "imagesTr/case_0_0000.nii.gz", tmp_path / "out")
    assert found.shape == (16, 16, 16, 3) and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda w: (w / "model.safetensors").unlink(), r"model\.safetensors: no such file \(the training is not finished"),
        (lambda w: (w / "model.safetensors").write_bytes(b"1234"), "not a readable safetensors file"),
        (lambda w: (w / "fitted.json").write_text("{"), r"fitted\.json: not JSON"),
        (lambda w: (w / "fitted.json").write_text("{}"), "not written by this version"),
        (lambda w: (w / "fitted.json").unlink(), r"no fitted\.json in it"),
        (lambda w: (w / "config.json").write_text('{"model": "subprocess.Popen", "kwargs": {}}'), "Popen"),
    ],
)
def test_bad_weights_are_one_line(only, folder, tmp_path, spoiled, message):
    weights = shutil.copytree(only, tmp_path / "w")
    spoiled(weights)
    with pytest.raises(UserError, match=message) as error:
        predict(weights, folder / "imagesTr", tmp_path / "out", device="cpu", quiet=True)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision: expected auto, 32-true, bf16-mixed, 16-mixed, got 'half'"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"overlap": 1.0}, "overlap: expected 0 to less than 1"),
        ({"device": "cuda:99"}, "device: cuda:99"),
        ({"out": "x.nii.gz"}, r"out: expected a folder for 4 case\(s\)"),
        ({"run": "nowhere"}, "run: nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_one_line(only, folder, tmp_path, options, message):
    options = {"run": only, "inputs": folder / "imagesTr", "out": tmp_path / "out", "device": "cpu", "quiet": True, **options}
    with pytest.raises(UserError, match=message):
        predict(options.pop("run"), options.pop("inputs"), options.pop("out"), **options)


def test_folds_of_different_classes_are_refused(trained, folder, tmp_path):
    other = shutil.copytree(trained / "fold_1", tmp_path / "other")
    fitted = json.loads((other / "fitted.json").read_text())
    (other / "fitted.json").write_text(json.dumps({**fitted, "classes": {"background": 0, "box": 1, "ball": 2}}))
    with pytest.raises(UserError, match="has the classes"):
        predict([trained / "fold_0", other], folder / "imagesTr", tmp_path / "out", device="cpu", quiet=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(only, tmp_path):
    image, _ = volume(7)
    path = write(tmp_path / "a.nii.gz", image[..., 0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(UserError, match=r"out\.nii: the disk is full"):
            predict(only, path, tmp_path / "out.nii", device="cpu", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]
