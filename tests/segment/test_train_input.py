"""What the network is fed: fitted spacing, intensities and patch, geometry, patches, and the loss on them."""

import dataclasses
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from monai.losses import DiceCELoss
from monai.transforms import Compose

import medssm.segment.volumes as volumes_module
from medssm.errors import UserError
from medssm.files import write_bytes
from medssm.segment.data import load_dataset
from medssm.segment.fit import check_units, fit, fit_mirror, fit_patch, fit_slice_axis, fit_spacing, resampled_shapes
from medssm.segment.images import read_image, read_label
from medssm.segment.intensity import scaling
from medssm.segment.losses import SegmentationLoss
from medssm.segment.patches import Patches
from medssm.segment.preprocess import IGNORE, Fitted, load_image, load_label, pad
from tests.segment.synthetic import nnunet_folder, write

OBLIQUE_LAS = np.array([[-0.9, 0.1, 0.0, 40.0], [0.1, 0.9, -0.2, -20.0], [0.0, 0.2, 2.5, 10.0], [0, 0, 0, 1.0]])
SHAPE = (24, 22, 14)


def axes_order(spacing, order):
    """An affine whose file axis i runs along the RAS axis order[i]."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[:, list(order)]
    return affine


def read(folder, **changes):
    table = load_dataset(folder)
    options = {
        "spatial_dims": 3,
        "spacing": None,
        "patch": (16, 16, 8),
        "mirror": (),
        "modality": None,
        "nan": None,
        "cache": None,
        "seed": 0,
        "quiet": True,
    }
    return fit(table, table.cases, fabric=Fabric(accelerator="cpu", devices=1), **{**options, **changes})


def test_spacing_is_the_median_along_the_ras_axes(tmp_path):
    cases = []
    for i, (edge, order) in enumerate([(1.0, (0, 1, 2)), (2.0, (2, 0, 1)), (4.0, (1, 2, 0))]):
        cases += load_dataset(nnunet_folder(tmp_path / str(i), cases=1, shape=SHAPE, affine=axes_order((edge, 1.5, 3.0), order))).cases
    np.testing.assert_allclose(fit_spacing(cases), (2.0, 1.5, 3.0))
    assert fit_slice_axis(cases) == 2 and fit_slice_axis(cases[2:]) == 0


def test_headers_are_read_once(tmp_path, monkeypatch):
    cases = load_dataset(nnunet_folder(tmp_path, cases=3, shape=(20, 18, 16), affine=np.diag([1, 2, 3, 1.0]))).cases
    monkeypatch.setattr("medssm.segment.images.nifti.open_file", lambda path: pytest.fail(f"{path} is opened again"))
    check_units(cases)
    assert fit_spacing(cases) == (1, 2, 3) and fit_slice_axis(cases) == 2
    np.testing.assert_array_equal(resampled_shapes(cases, (1, 1, 1)), [(20, 36, 48)] * 3)


@pytest.mark.parametrize(
    ("shape", "spacing", "voxels", "wanted"),
    [
        ((200, 200, 200), (1, 1, 1), 64**3, (64, 64, 64)),
        ((30, 20, 10), (1, 1, 1), 64**3, (32, 32, 16)),
        ((300, 300, 20), (0.5, 0.5, 4), 64**3, (128, 128, 16)),
    ],
)
def test_a_patch_has_the_shape_of_the_median_case(shape, spacing, voxels, wanted):
    assert fit_patch(shape, spacing, voxels, (16, 16, 16)) == wanted


def test_geometry_is_ras_at_the_spacing_and_the_label_follows_the_image(tmp_path):
    table = load_dataset(nnunet_folder(tmp_path, cases=1, shape=SHAPE, affine=OBLIQUE_LAS))
    image, label = load_image(table.cases[0], 1, (1.0, 1.0, 1.0)), load_label(table.cases[0], table, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), 1.0, atol=1e-5)
    assert image.affine[0, 0] > 0 and image.shape[1:] == label.shape
    inside = {i: float(image[0][label == i].median()) for i in range(3)}
    assert abs(inside[0] - 100) < 10 and abs(inside[1] - 180) < 10 and abs(inside[2] - 30) < 10
    voxels = (read_label(table.cases[0].label)[0] == 1).sum()
    assert abs(int((label == 1).sum()) / (voxels * abs(np.linalg.det(OBLIQUE_LAS[:3, :3]))) - 1) < 0.05


def test_a_ct_is_scaled_by_the_foreground_of_the_training_cases(tmp_path):
    def hounsfield(seed, image, label):
        image[..., 0] = np.where(label > 0, 50 + 10 * seed + image[..., 0] - np.array([100.0, 180.0, 30.0])[label], -1000)
        image[0, 0, 0] = 3000  # metal, outside of the foreground
        return image, label

    fitted, volumes = read(nnunet_folder(tmp_path, cases=2, shape=SHAPE, channels=("CT",), edit=hounsfield))
    values = np.concatenate([volume.image[0][volume.label > 0].numpy() for volume in volumes])
    how = fitted.intensity[0]
    assert how["scheme"] == "ct"
    np.testing.assert_allclose((how["low"], how["high"]), np.percentile(values, (0.5, 99.5)), atol=2.5)
    np.testing.assert_allclose((how["mean"], how["deviation"]), (values.mean(), values.std()), rtol=0.02)
    scaled = volumes[0].scaling(volumes[0].image)
    np.testing.assert_allclose(scaled.max(), (how["high"] - how["mean"]) / how["deviation"], rtol=1e-5)
    np.testing.assert_allclose(scaled.min(), (how["low"] - how["mean"]) / how["deviation"], rtol=1e-5)


def test_a_ct_without_any_foreground_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no training case has any"):
        read(nnunet_folder(tmp_path, cases=1, shape=SHAPE, channels=("CT",), edit=lambda seed, image, label: (image, label * 0)))


def test_other_modalities_are_scaled_image_by_image_over_nonzero_voxels():
    image = torch.cat([torch.zeros(1, 4, 4, 2), torch.tensor([3.0, 5.0]).expand(1, 4, 4, 2)])
    image[0, 0] = torch.tensor([2.0, 4.0])
    scaled = scaling(image, [{"scheme": "zscore"}, {"scheme": "none"}])(image)
    assert scaled[0, 0].unique().tolist() == [-1, 1] and scaled[0, 1:].unique().tolist() == [-3]
    torch.testing.assert_close(scaled[1], image[1])


def test_padding_is_each_channels_minimum():
    image = torch.arange(2 * 2 * 3 * 4.0).reshape(2, 2, 3, 4)
    padded, inside = pad(image, (4, 3, 5))
    torch.testing.assert_close(padded[(slice(None), *inside)], image)
    assert padded.shape == (2, 4, 3, 5) and padded[0, 0].unique().tolist() == [0] and padded[1, 0].unique().tolist() == [24]
    assert pad(image, (1, 1, 1))[0] is image


def test_a_label_outside_the_classes_names_file_and_value(tmp_path):
    def strange(seed, image, label):
        return image, np.where((label == 1) & (seed == 1), 6, label).astype(np.uint8)

    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE, edit=strange)
    with pytest.raises(UserError, match=r"case_1\.nii\.gz: label value\(s\) 6 outside the classes \[0, 1, 2\]"):
        read(folder)


def test_every_case_that_cannot_be_read_is_one_line(tmp_path):
    def spoiled(seed, image, label):
        image[0, 0, 0] = [0, np.nan, np.inf][seed]
        return image, label

    with pytest.raises(UserError) as error:
        read(nnunet_folder(tmp_path, cases=3, shape=SHAPE, edit=spoiled))
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all(f"case_{i + 1}_0000.nii.gz: 1 voxel(s) are not finite" in line for i, line in enumerate(lines))


def test_labels_that_are_not_consecutive_become_positions(tmp_path):
    def renamed(seed, image, label):
        values = np.array([0, 10, 200], np.uint8)[label]
        values[(label == 0) & (image[..., 0] > 115)] = 7
        return image, values

    labels = {"background": 0, "ball": 10, "box": 200, "ignore": 7}
    fitted, (volume,) = read(nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels=labels, edit=renamed))
    assert fitted.classes == {"background": 0, "ball": 10, "box": 200} and fitted.ignore == 7
    assert volume.label.unique().tolist() == [IGNORE, 0, 1, 2]


def test_what_was_fitted_survives_its_file(tmp_path):
    fitted, _ = read(nnunet_folder(tmp_path, cases=1, shape=SHAPE))
    fitted.save(tmp_path / "fitted.json")
    assert Fitted.load(tmp_path / "fitted.json") == fitted


def test_a_cache_gives_the_same_volumes_and_is_used(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    plain = read(folder)[1]
    first, again = (read(folder, cache=tmp_path / "cache")[1] for _ in range(2))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for volumes in (first, again):
        for volume, wanted in zip(volumes, plain, strict=True):
            assert torch.equal(volume.image, wanted.image) and torch.equal(volume.label, wanted.label)


@pytest.fixture
def cached(tmp_path):
    """load(...) of one case with a cache, and how often the case's files were read."""
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=SHAPE, channels=("MR",))
    read_files = []
    with pytest.MonkeyPatch.context() as patch:
        real = volumes_module._load
        patch.setattr(volumes_module, "_load", lambda *arguments: read_files.append(1) or real(*arguments))

        def load(spacing=(1.0, 1.0, 1.0), **changes):
            table = dataclasses.replace(load_dataset(folder), **changes)
            (arrays,) = volumes_module.load(table.cases, table, spacing, tmp_path / "cache")
            return arrays, len(read_files)

        yield load, folder, tmp_path / "cache"


def test_a_cached_case_is_not_read_again(cached):
    load, _, cache = cached
    temporary = tempfile.gettempdir()
    (image, label), count = load()
    (again, label_again), count_again = load()
    assert tempfile.gettempdir() == temporary  # of the cache's folder for a moment only
    assert (count, count_again) == (1, 1) and torch.equal(image, again) and torch.equal(label, label_again)
    assert (image.dtype, label.dtype) == (torch.float32, torch.int16) and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "changes",
    [{"spacing": (1.0, 1.0, 2.0)}, {"ignore": 2, "classes": {"background": 0, "ball": 1}}, {"classes": {"background": 0, "box": 2, "ball": 1}}],
)
def test_a_cached_case_is_read_again_when_what_it_depends_on_changes(cached, changes):
    load, _, _ = cached
    (image, label), _ = load()
    (other, other_label), count = load(**changes)
    assert count == 2 and (image.shape != other.shape or not torch.equal(label, other_label))
    assert load()[1] == load(**changes)[1] == 2


def test_ignore_alone_changes_the_entry(cached):
    """A value that no voxel has: the arrays are the same, but the entry of one data set is not taken for the other's."""
    load, _, cache = cached
    load(), load(ignore=9)
    assert load(ignore=9)[1] == 2 and len(list(cache.iterdir())) == 2


def test_a_changed_file_is_read_again(cached):
    load, folder, _ = cached
    (image, _), _ = load()
    for file in (folder / "imagesTr").iterdir():
        write(file, read_image([file])[0][0] + 1)
    (other, _), count = load()
    assert count == 2 and torch.equal(other, image + 1)
    for file in (folder / "labelsTr").iterdir():
        write(file, np.zeros(SHAPE, np.uint8))
    (_, label), count = load()
    assert count == 3 and not label.any()


@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"junk" + data[4:-200], lambda data: data[:-30]]
)
def test_a_damaged_entry_is_made_again(cached, spoil):
    load, _, cache = cached
    (image, label), _ = load()
    (entry,) = cache.iterdir()
    write_bytes(entry, spoil(entry.read_bytes()))
    (again, label_again), count = load()
    assert count == 2 and torch.equal(again, image) and torch.equal(label_again, label) and list(cache.iterdir()) == [entry]


def test_an_entry_that_holds_something_else_is_made_again(cached):
    load, _, cache = cached
    load()
    (entry,) = cache.iterdir()
    entry.unlink()
    torch.save({"weights": torch.zeros(3)}, entry)
    assert load()[1] == 2 and load()[1] == 2


@pytest.mark.thorough
def test_processes_that_fill_a_cache_at_once_all_get_the_arrays(cached, tmp_path):
    load, folder, cache = cached
    code = (
        "import sys, torch; from pathlib import Path; from medssm.segment.data import load_dataset; from medssm.segment.volumes import load;"
        "table = load_dataset(sys.argv[1]); (arrays,) = load(table.cases, table, (1.0, 1.0, 1.0), sys.argv[2]);"
        "torch.save([part.clone() for part in arrays], sys.argv[3])"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(cache), str(tmp_path / str(i))]) for i in range(3)]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    arrays, count = load()
    assert count == 0 and len(list(cache.iterdir())) == 1
    for i in range(3):
        assert all(torch.equal(one, other) for one, other in zip(torch.load(tmp_path / str(i)), arrays, strict=True))


def test_a_cache_that_cannot_be_written_is_one_line(cached, monkeypatch):
    load, _, cache = cached
    cache.write_text("a file")
    with pytest.raises(UserError, match="cache: cannot be written"):
        load()
    cache.unlink()
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cache: the disk is full"):
        load()
    assert not list(cache.iterdir())
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("[enforce fail] unexpected pos 64 vs 0")))
    with pytest.raises(UserError, match=r"cache: .*cannot be written \(\[enforce fail"):
        load()
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"cache: .*cannot be written"):
        load()


def test_a_bad_case_under_a_cache_is_its_own_error(cached):
    load, folder, cache = cached
    write(folder / "labelsTr" / "case_0.nii.gz", np.full(SHAPE, 7, np.uint8))
    with pytest.raises(UserError, match=r"^\S*case_0\.nii\.gz: label value\(s\) 7 outside the classes"):
        load()
    assert not list(cache.iterdir())


def test_too_much_for_the_memory_asks_for_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("medssm.machine.free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"cache: the cases take .* name a folder"):
        read(nnunet_folder(tmp_path, cases=1, shape=SHAPE))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    fitted, volumes = read(nnunet_folder(tmp_path_factory.mktemp("data"), cases=2, shape=(40, 36, 32)), patch=(16, 12, 8))
    return fitted, volumes


def test_a_patch_depends_on_seed_and_index_alone(volumes):
    one, other = (Patches(volumes[1], volumes[0], seed=3) for _ in range(2))
    for i in (5, 0, 5):
        assert all(torch.equal(one[i][key], other[i][key]) for key in ("image", "label")) and one[i]["case"] == other[i]["case"]
    assert not torch.equal(one[0]["image"], Patches(volumes[1], volumes[0], seed=4)[0]["image"])
    assert not torch.equal(one[0]["image"], one[1]["image"])


def test_patches_have_their_shape_and_labels(volumes):
    for patch in (Patches(volumes[1], volumes[0])[i] for i in range(40)):
        image, label = patch["image"], patch["label"]
        assert image.shape == label.shape == (1, 16, 12, 8) and (image.dtype, label.dtype) == (torch.float32, torch.int64)
        assert image.isfinite().all() and set(label.unique().tolist()) <= {0, 1, 2} and patch["case"] in ("case_0", "case_1")


def test_the_label_turns_zooms_and_mirrors_with_the_image(volumes, monkeypatch):
    """Where the image is bright there is the ball, up to the voxels at its border."""
    monkeypatch.setattr("medssm.segment.patches._TURNED", 1.0)
    patches = Patches(volumes[1], dataclasses.replace(volumes[0], mirror=(0, 1, 2)), foreground=1.0)
    patches.intensity = Compose([])
    image, label = (torch.stack([patches[i][key] for i in range(60)]) for key in ("image", "label"))
    middle = (image[label == 1].mean() + image[label == 0].mean()) / 2
    assert (label == 1).float().mean() > 0.05 and ((image > middle) == (label == 1)).float().mean() > 0.98


def test_augmented_intensities_keep_the_order_of_the_classes(volumes):
    patches = Patches(volumes[1], volumes[0], foreground=1.0)
    for image, label in ((patches[i]["image"], patches[i]["label"]) for i in range(60)):
        means = [float(image[label == i].mean()) if (label == i).sum() > 100 else None for i in (2, 0, 1)]
        kept = [mean for mean in means if mean is not None]
        assert kept == sorted(kept)


@pytest.mark.parametrize("foreground", [0.0, 1 / 3, 1.0])
def test_the_share_of_patches_centred_on_a_class(volumes, foreground):
    fitted = dataclasses.replace(volumes[0], patch=(1, 1, 1))
    patches = Patches(volumes[1], fitted, foreground=foreground, augment=False)
    hit = np.mean([int(patches[i]["label"].item() > 0) for i in range(600)])
    share = np.mean([float((volume.label > 0).float().mean()) for volume in volumes[1]])
    assert abs(hit - (foreground + (1 - foreground) * share)) < 0.06


def test_mirroring_keeps_to_its_axes(volumes):
    plain = Patches(volumes[1], volumes[0], augment=False)
    mirrored = Patches(volumes[1], dataclasses.replace(volumes[0], mirror=(1,)), augment=False)
    flips = 0
    for i in range(20):
        a, b = plain[i]["image"], mirrored[i]["image"]
        flipped = torch.equal(a.flip(2), b)
        assert flipped or torch.equal(a, b)
        flips += flipped
    assert 4 <= flips <= 16


@pytest.mark.parametrize(
    ("mirror", "classes", "wanted"),
    [
        ("auto", ("background", "liver"), (0,)),
        ("auto", ("background", "Hippocampus_L"), ()),
        ("auto", ("background", "kidney left"), ()),
        ((), ("background", "liver"), ()),
        ((1, 2), ("background", "liver"), (1, 2)),
    ],
)
def test_sides_are_not_mirrored_away(tmp_path, mirror, classes, wanted):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels={**{name: i for i, name in enumerate(classes)}, "other": 2})
    assert read(folder, mirror=mirror)[0].mirror == wanted


def test_pictures_are_mirrored_along_all_their_axes():
    cells, eyes = ["background", "cell"], ["background", "left eye", "right eye"]
    assert fit_mirror("auto", cells, (0, 1), oriented=False) == ((0, 1), ()) and fit_mirror("auto", cells, (0, 1), oriented=True) == ((0,), ())
    assert fit_mirror("auto", eyes, (0, 1), oriented=False) == ((1,), ()) and fit_mirror("auto", cells, (1, 2), oriented=True) == ((), ())
    assert fit_mirror("swap", eyes, (0, 1), oriented=False) == ((0, 1), ((1, 2),)) and fit_mirror("swap", eyes, (0, 1), oriented=True)[0] == (0,)


def test_slices_of_a_2d_network(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, affine=axes_order((1, 1, 4.0), (2, 0, 1)))
    fitted, volumes = read(folder, spatial_dims=2, patch=(16, 12))
    assert fitted.slice_axis == 2 and fitted.spacing == (1.0, 1.0, 0.0) and fitted.volume_patch == (16, 12, 1)
    for patch in (Patches(volumes, fitted)[i] for i in range(30)):
        assert patch["image"].shape == patch["label"].shape == (1, 16, 12) and patch["image"].isfinite().all()


def test_patches_lie_on_voxels_that_have_a_label(tmp_path):
    def scribble(seed, image, label):
        scribbled = np.full_like(label, 3)
        scribbled[4:7, 4:7, 4:7] = 0
        scribbled[label > 0] = label[label > 0]
        return image, scribbled

    labels = {"background": 0, "ball": 1, "box": 2, "ignore": 3}
    fitted, volumes = read(nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels=labels, edit=scribble), patch=(4, 4, 4))
    patches = Patches(volumes, fitted, foreground=0.0, augment=False)
    assert all((patches[i]["label"] != IGNORE).any() for i in range(50))


def logits_and_label(seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 6, 5, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 3, (2, 1, 6, 5, 4))


@pytest.mark.parametrize("ignore", [False, True])
def test_the_loss_is_monais_where_nothing_is_ignored(ignore):
    logits, label = logits_and_label()
    wanted = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(logits.float(), label)
    torch.testing.assert_close(SegmentationLoss(ignore)(logits, label), wanted)


def test_ignored_voxels_are_as_if_they_were_not_there():
    logits, label = logits_and_label()
    part = SegmentationLoss(ignore=True)(logits[..., :2, :], label[..., :2, :])
    label[..., 2:, :] = IGNORE
    whole = SegmentationLoss(ignore=True)(logits, label)
    torch.testing.assert_close(whole, part)
    (gradient,) = torch.autograd.grad(whole, logits)
    assert not gradient[..., 2:, :].any() and gradient[..., :2, :].all()


def test_a_patch_without_any_label_costs_nothing():
    logits, label = logits_and_label()
    loss = SegmentationLoss(ignore=True)(logits, torch.full_like(label, IGNORE))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


def test_deep_supervision_weighs_heads_by_halves():
    logits, label = logits_and_label()
    coarse, loss = torch.randn(2, 3, 3, 3, 2), SegmentationLoss()
    small = torch.nn.functional.interpolate(label.float(), (3, 3, 2), mode="nearest").long()
    torch.testing.assert_close(loss([logits, coarse], label), (2 * loss(logits, label) + loss(coarse, small)) / 3)
    torch.testing.assert_close(loss(torch.stack([logits, logits + 1], 1), label), (2 * loss(logits, label) + loss(logits + 1, label)) / 3)
