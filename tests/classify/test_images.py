"""What a classifier sees of a file, and how samples are drawn from it."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medssm.classify import images as module
from medssm.classify.images import Fitted, Images, fit, fit_shape, prepared, resized
from medssm.classify.loss import WeightedEntropy, balanced_weights
from medssm.classify.samples import Samples
from medssm.classify.table import Sample
from medssm.errors import UserError
from tests.classify.pictures import volumes

NONE = ({"scheme": "none"},)


def fitted(shape=(8, 6), sizes="resize", channels=("grey",), axes=(0, 1), **kwargs) -> Fitted:
    return Fitted(channels, ("a", "b"), shape, sizes, kwargs.pop("spacing", None), kwargs.pop("intensity", NONE * len(channels)), axes, axes)


def samples(*paths) -> list[Sample]:
    return [Sample(path.name, path, "ab"[i % 2]) for i, path in enumerate(paths)]


def fitted_to(found, **kwargs) -> Fitted:
    options = {"spatial_dims": None, "shape": None, "sizes": "resize", "spacing": None, "mirror": "auto", "modality": None, "nan": None}
    return fit(found, ("a", "b"), **{**options, "gpu": False, "seed": 0, "show": lambda *_: None, **kwargs})


def ramp(path, width=8, height=6, mode="L"):
    """A picture that is brighter to the right (20 a column) and darker at the bottom."""
    data = 20 * np.arange(width)[None] + 5 * np.arange(height, 0, -1)[:, None]
    Image.fromarray(data.astype(np.uint8)).convert(mode).save(path)
    return path


def test_a_picture_lies_as_ras_has_it(tmp_path):
    image = prepared(ramp(tmp_path / "a.png"), fitted())
    assert image.shape == (1, 8, 6) and image.dtype == torch.float32
    # columns of a picture go to the left and rows to the back, so both axes are turned
    np.testing.assert_array_equal(image[0, :, 0], 20 * np.arange(8)[::-1] + 5)
    np.testing.assert_array_equal(image[0, -1, :], 5 * np.arange(1, 7))


def test_other_shapes_are_resized_or_padded(tmp_path):
    path = ramp(tmp_path / "a.png", 8, 6)
    assert prepared(path, fitted((16, 12))).shape == (1, 16, 12)
    middle = prepared(path, fitted((4, 10), "pad"))
    whole = prepared(path, fitted())
    torch.testing.assert_close(middle[:, :, 2:8], whole[:, 2:6])
    assert (middle[:, :, :2] == whole.min()).all() and (middle[:, :, 8:] == whole.min()).all()


@pytest.mark.parametrize("shape", [(12, 20), (4, 5), (10, 4, 7)])
def test_resizing_is_pillows(shape):
    """Pillow's bilinear filter is wider where an image gets smaller; along the third axis the same again."""
    image = torch.rand(2, *(8, 9, 10)[: len(shape)])
    found = resized(image, shape)
    for i in range(2):
        planes = image[i] if len(shape) == 3 else image[i][..., None]
        small = [np.asarray(Image.fromarray(plane.numpy()).resize(shape[1::-1], Image.Resampling.BILINEAR)) for plane in planes.unbind(-1)]
        wanted = torch.from_numpy(np.stack(small, -1)).reshape(*shape[:2], -1)
        if len(shape) == 3:
            rows = Image.fromarray(wanted.flatten(0, 1).numpy()).resize((shape[2], shape[0] * shape[1]), Image.Resampling.BILINEAR)
            wanted = torch.from_numpy(np.asarray(rows).copy()).reshape(shape)
        torch.testing.assert_close(found[i], wanted.reshape(shape), rtol=0, atol=1e-5)


def test_volumes_of_any_orientation_and_spacing(tmp_path):
    data = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 1, 1, 1])), tmp_path / "a.nii.gz")
    nib.save(
        nib.Nifti1Image(data[::-1].transpose(1, 0, 2), np.array([[0, -2.0, 0, 6], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])), tmp_path / "b.nii.gz"
    )
    own = fitted((4, 5, 6), channels=("channel_0",), axes=(0, 1, 2))
    for name in "ab":
        np.testing.assert_array_equal(prepared(tmp_path / f"{name}.nii.gz", own)[0], data)
    finer = prepared(tmp_path / "b.nii.gz", fitted((7, 5, 6), "pad", ("channel_0",), (0, 1, 2), spacing=(1.0, 1.0, 1.0)))
    np.testing.assert_allclose(finer[0, ::2], data, atol=1e-3)


def test_greys_among_colours(tmp_path):
    paths = [ramp(tmp_path / "a.png", mode="RGB"), ramp(tmp_path / "b.png")]
    found = fitted_to(samples(*paths))
    assert found.channels == ("red", "green", "blue") and [how["scheme"] for how in found.intensity] == ["picture"] * 3
    torch.testing.assert_close(*[prepared(path, found) for path in paths])
    with pytest.raises(UserError, match=r"a.png: expected 1 channel\(s\), got 3"):
        prepared(paths[0], fitted())


def test_pictures_are_scaled_by_the_training_images_alone(tmp_path):
    for i, value in enumerate((50, 100, 150)):
        data = np.full((32, 32), value, np.uint8)
        data[0] += 10
        Image.fromarray(data).save(tmp_path / f"{i}.png")
    found = fitted_to(samples(tmp_path / "0.png", tmp_path / "1.png"))
    assert found.channels == ("grey",) and found.shape == (32, 32) and found.axes == (0, 1) and found.mirror == (0, 1)
    assert found.intensity[0]["mean"] == pytest.approx(75, abs=1) and found.intensity[0]["deviation"] == pytest.approx(25, abs=1)
    levels = [prepared(tmp_path / f"{i}.png", found)[0, :, 5].mean().item() for i in range(2)]
    assert levels == pytest.approx([-1, 1], abs=0.1)


def test_what_was_fitted_is_read_again(tmp_path):
    found = fitted((8, 6), spacing=(1.0, 2.0, 3.0))
    found.save(tmp_path / "fitted.json")
    assert Fitted.load(tmp_path / "fitted.json") == found
    (tmp_path / "fitted.json").write_text(json.dumps({"task": "classify", "strange": 1}))
    with pytest.raises(UserError, match="not written by this version of medssm train"):
        Fitted.load(tmp_path / "fitted.json")
    (tmp_path / "fitted.json").write_text("{}")
    with pytest.raises(UserError, match="of a network that segments, where a classifier is expected"):
        Fitted.load(tmp_path / "fitted.json")


def test_the_default_shape():
    assert fit_shape([(64, 64), (64, 64), (70, 60)], 128**2) == (64, 64)
    assert fit_shape([(2000, 1000)], 128**2) == (176, 96)
    assert fit_shape([(20, 200, 200)], 64**3) == (32, 144, 144)


def test_bad_images_are_one_clear_line(tmp_path):
    flat, deep = ramp(tmp_path / "flat.png"), next(volumes(tmp_path / "volumes", 1).glob("*/*.nii.gz"))
    with pytest.raises(UserError, match=r"a volume, where the network takes planes|a plane, where the network takes volumes"):
        fitted_to(samples(flat, deep))
    with pytest.raises(UserError, match=r"flat.png: a plane, where the network takes volumes \(pass --spatial-dims 2\)"):
        fitted_to(samples(flat, flat), spatial_dims=3)
    with pytest.raises(UserError, match="where the network takes planes"):
        prepared(deep, fitted())
    Image.new("L", (8, 6), 7).save(tmp_path / "empty.png")
    with pytest.raises(UserError, match=r"empty.png: every voxel of the image is 7"):
        prepared(tmp_path / "empty.png", fitted())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        Images(samples(tmp_path / "broken.png", flat, tmp_path / "empty.png"), fitted())
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [str(tmp_path / "broken.png"), str(tmp_path / "empty.png")]


def test_images_that_memory_cannot_hold_are_read_when_they_are_needed(tmp_path, monkeypatch):
    path = ramp(tmp_path / "a.png")
    kept = Images(samples(path), fitted())
    monkeypatch.setattr(module.machine, "free_memory", lambda: 8 * 6 * 4)
    later = Images(samples(path), fitted())
    assert kept.kept is not None and later.kept is None
    torch.testing.assert_close(kept[0], later[0])


@pytest.fixture
def four(tmp_path):
    return Images(samples(*[ramp(tmp_path / f"{i}.png", 8, 6 + 0 * i) for i in range(4)]), fitted())


def test_a_sample_depends_on_the_seed_and_its_number_alone(four):
    one, other = (Samples(four, [0, 1, 0, 1], seed=0, mixup=0.4) for _ in range(2))
    for i in (5, 0, 3):
        torch.testing.assert_close(one[i]["image"], other[i]["image"], rtol=0, atol=0)
        torch.testing.assert_close(one[i]["label"], other[i]["label"], rtol=0, atol=0)
    assert not torch.equal(one[0]["image"], Samples(four, [0, 1, 0, 1], seed=1, mixup=0.4)[0]["image"])


def test_each_pass_has_every_image_once_in_its_own_order(four):
    drawn = Samples(four, [0, 1, 0, 1], augment=False)
    passes = [[drawn[4 * turn + i]["case"] for i in range(4)] for turn in range(8)]
    assert all(sorted(names) == [f"{i}.png" for i in range(4)] for names in passes) and len({tuple(names) for names in passes}) > 1
    for i in range(8):
        assert drawn[i]["label"].argmax() == int(drawn[i]["case"][0]) % 2 and drawn[i]["label"].sum() == 1


def test_mixup_mixes_images_and_labels_alike(four):
    four.kept = [torch.full((1, 8, 6), float(i)) for i in range(4)]
    drawn = Samples(four, [0, 1, 0, 1], augment=False, mixup=1.0)
    found = [drawn[i] for i in range(64)]
    assert any(0.05 < sample["label"][0] < 0.95 for sample in found)
    for sample in found:
        first, level = int(sample["case"][0]), sample["image"].mean().item()
        share = [level - other for other in range(4)]
        assert sample["label"].sum().item() == pytest.approx(1)
        # level = m * first + (1 - m) * other, and the label says m where the two classes differ
        fits = [
            abs(m * (first % 2) + (1 - m) * (other % 2) - sample["label"][1].item()) < 1e-5
            for other in range(4)
            for m in ([share[other] / (first - other)] if first != other else [1.0])
            if -1e-6 <= m <= 1 + 1e-6
        ]
        assert any(fits)


def test_the_loss_weighs_classes_and_smooths_labels():
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.2, 0.1]]), torch.tensor([0, 2])
    onehot = torch.nn.functional.one_hot(labels, 3).float()
    assert WeightedEntropy(None, 0.0)(logits, onehot).item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    weights, log_p = torch.tensor([0.5, 1.0, 2.0]), logits.log_softmax(1)
    smooth = 0.9 * onehot + 0.1 / 3
    assert WeightedEntropy([0.5, 1.0, 2.0], 0.1)(logits, onehot).item() == pytest.approx(-(weights * smooth * log_p).sum(1).mean().item())
    assert balanced_weights([0, 0, 0, 1], 2) == pytest.approx([4 / 6, 2.0])
