"""Values and boundaries of what a network is fed and of the windows it predicts in; each test is one that a changed condition or axis would fail."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.data import Dataset
from medssm.segment.inference import probabilities
from medssm.segment.intensity import scaling
from medssm.segment.patches import Patches, _rotations
from medssm.segment.preprocess import IGNORE, Fitted, geometry, load_label, pad
from medssm.segment.volumes import prepare
from tests.segment.synthetic import write

FITTED = Fitted(("MR",), (1.0, 1.0, 1.0), ({"scheme": "none"},), {"background": 0, "ball": 1, "box": 2}, None, (4, 4, 4))


# ---- preprocess


@pytest.mark.parametrize(("axis", "wanted"), [(None, (5, 6)), (0, (1, 5, 6)), (1, (5, 1, 6)), (2, (5, 6, 1))])
def test_a_2d_patch_is_one_slice_thick_in_the_volume(axis, wanted):
    assert dataclasses.replace(FITTED, patch=(5, 6), slice_axis=axis).volume_patch == wanted


def test_a_file_of_another_version_is_one_line(tmp_path):
    (tmp_path / "fitted.json").write_text('{"channels": ["MR"], "colour": 1}')
    with pytest.raises(UserError, match=r"fitted.json: not written by this version of medssm train \(.*colour"):
        Fitted.load(tmp_path / "fitted.json")
    FITTED.save(tmp_path / "fitted.json")
    assert Fitted.load(tmp_path / "fitted.json") == FITTED and isinstance(Fitted.load(tmp_path / "fitted.json").patch, tuple)


def test_resampling_repeats_the_border_and_goes_back_to_the_same_shape():
    image = MetaTensor(torch.full((1, 5, 4, 7), 3.0), affine=torch.diag(torch.tensor([-1.0, 1.0, 2.5, 1.0], dtype=torch.float64)))
    grid = geometry((0.7, 1.0, 1.0))
    moved = grid(image)
    assert moved.shape[1:] == (7, 4, 16) and moved.dtype == torch.float32  # (5 - 1) / 0.7 + 1 and (7 - 1) * 2.5 + 1
    torch.testing.assert_close(moved.as_tensor(), torch.full((1, 7, 4, 16), 3.0))
    assert moved.affine[0, 0] > 0 and grid.inverse(moved).shape == image.shape


def test_images_are_interpolated_and_labels_are_not():
    ramp = MetaTensor(torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1), affine=torch.diag(torch.tensor([2.0, 1, 1, 1], dtype=torch.float64)))
    assert geometry((1.0, 1.0, 1.0))(ramp).flatten().tolist() == [0, 1, 2]
    assert set(geometry((1.0, 1.0, 1.0), mode="nearest")(ramp).flatten().tolist()) == {0, 2}


def label_case(tmp_path, values, affine=None) -> Case:
    return Case("a", (write(tmp_path / "image.nii", np.zeros(values.shape, np.float32)),), write(tmp_path / "label.nii", values, affine))


def test_a_label_map_becomes_positions_without_new_classes(tmp_path):
    values = np.zeros((6, 5, 4), np.uint8)
    values[3:], values[:, 0] = 9, 4
    data = Dataset("", ("MR",), {"background": 0, "middle": 5, "ball": 9}, 4, ())
    found = load_label(label_case(tmp_path, values), data, (0.5, 0.5, 0.5))
    assert found.shape == (11, 9, 7) and found.dtype == torch.int16 and found.unique().tolist() == [IGNORE, 0, 2]
    with pytest.raises(UserError, match=r"label value\(s\) 4 outside"):
        load_label(label_case(tmp_path, values), dataclasses.replace(data, ignore=None), (1.0, 1.0, 1.0))


def test_a_label_map_lies_on_the_grid_of_its_image(tmp_path):
    case = label_case(tmp_path, np.zeros((6, 5, 4), np.uint8), np.diag([1, 1, 2, 1]))
    with pytest.raises(UserError, match=r"label.nii: not on the grid of .*image.nii: the affine puts a corner 3 mm away"):
        load_label(case, Dataset("", ("MR",), {"background": 0}, None, ()), (1.0, 1.0, 1.0))


def test_constant_and_empty_channels_are_only_shifted():
    image = torch.stack([torch.full((2, 2, 2), 7.0), torch.zeros(2, 2, 2), torch.arange(8.0).reshape(2, 2, 2)])
    ct = {"scheme": "ct", "low": 2.0, "high": 5.0, "mean": 3.0, "deviation": 2.0}
    scaled = scaling(image, [{"scheme": "zscore"}, {"scheme": "zscore"}, ct])(image)
    assert not scaled[:2].any()
    assert scaled[2].flatten().tolist() == [-0.5, -0.5, -0.5, 0, 0.5, 1, 1, 1]
    assert image[0, 0, 0, 0] == 7  # the image itself is not changed
    single = torch.zeros(1, 2, 2, 2)
    single[0, 0, 0, 1] = 7
    assert scaling(single, [{"scheme": "zscore"}])(single).flatten().tolist() == [-7, 0, -7, -7, -7, -7, -7, -7]


@pytest.mark.parametrize(("size", "wanted", "start"), [(3, 8, 2), (4, 7, 1), (7, 8, 0), (5, 5, 0), (6, 5, 0)])
def test_padding_is_even_on_both_sides_and_odd_voxels_come_last(size, wanted, start):
    volume = torch.arange(1.0, size + 1).reshape(1, size, 1, 1)
    padded, inside = pad(volume, (wanted, 1, 1), value=0)
    assert inside == (slice(start, start + size), slice(0, 1), slice(0, 1)) and padded.shape[1] == max(size, wanted)
    assert padded.flatten().tolist() == [0] * start + volume.flatten().tolist() + [0] * (max(size, wanted) - size - start)


# ---- patches


def volume(label, fitted=FITTED, image=None):
    """A case whose image holds each voxel's row-major position."""
    image = torch.arange(float(label.numel())).reshape(1, *label.shape) if image is None else image
    return prepare("a", image, label.to(torch.int16), fitted, 0)


def test_what_cropping_needs_of_a_label():
    label = torch.zeros(4, 4, 4)
    label[0, 0, 1], label[3, 3, 3], label[2, 2, 2] = 1, 2, IGNORE
    found = volume(label)
    assert [part.tolist() for part in found.classes] == [[1], [63]]
    assert len(found.labelled) == 63 and 42 not in found.labelled.tolist()
    assert volume(label.clamp(min=0)).labelled is None and volume(torch.zeros(4, 4, 4)).classes == ()
    many = volume(torch.ones(30, 30, 30))
    assert len(many.classes[0]) == 20_000 == len(set(many.classes[0].tolist()))


@pytest.mark.parametrize("width", [4, 5])
def test_a_patch_is_centred_on_its_voxel_and_moved_inside(width):
    fitted = dataclasses.replace(FITTED, patch=(width,) * 3)
    for place, start in ((8, 8 - width // 2), (0, 0), (1, 0), (15, 16 - width), (14, 16 - width)):
        label = torch.zeros(16, 16, 16)
        label[place, place, place] = 1
        patch = Patches([volume(label, fitted)], fitted, foreground=1.0, augment=False)[0]
        assert patch["image"][0, 0, 0, 0].item() == start * (256 + 16 + 1) and patch["image"].shape == (1, width, width, width)
        assert np.argwhere(patch["label"][0].numpy()).tolist() == [[place - start] * 3]


def test_background_patches_are_even_over_all_positions():
    fitted = dataclasses.replace(FITTED, patch=(4, 1, 3))
    patches = Patches([volume(torch.zeros(6, 1, 3), fitted)], fitted, augment=False)
    starts = [int(patches[i]["image"].min()) // 3 for i in range(300)]
    assert {place: starts.count(place) > 70 for place in set(starts)} == {0: True, 1: True, 2: True}


def test_the_classes_of_a_case_are_drawn_evenly():
    label = torch.zeros(8, 8, 8)
    label[:4], label[7, 7, 7] = 1, 2  # 256 voxels and one
    fitted = dataclasses.replace(FITTED, patch=(1, 1, 1))
    patches = Patches([volume(label, fitted)], fitted, foreground=1.0, augment=False)
    assert 0.4 < np.mean([patches[i]["label"].item() == 2 for i in range(200)]) < 0.6


def test_patches_without_a_class_lie_on_labelled_voxels():
    label = torch.full((8, 8, 8), IGNORE)
    label[2, 3, 4] = 0
    fitted = dataclasses.replace(FITTED, patch=(1, 1, 1))
    patches = Patches([volume(label, fitted)], fitted, foreground=1.0, augment=False)
    assert {patches[i]["image"].item() for i in range(20)} == {2 * 64 + 3 * 8 + 4}


@pytest.mark.parametrize(("slice_axis", "mirror", "axes"), [(0, (1,), [1]), (0, (2,), [2]), (1, (0,), [1]), (1, (2,), [2]), (2, (0, 1), [1, 2])])
def test_a_2d_patch_is_mirrored_along_the_volumes_axes(slice_axis, mirror, axes):
    fitted = dataclasses.replace(FITTED, patch=(4, 5), slice_axis=slice_axis, mirror=mirror)
    shape = fitted.volume_patch
    patches = Patches([volume(torch.zeros(shape), fitted)], fitted, augment=False)
    plain = torch.arange(20.0).reshape(1, 4, 5)
    wanted = [plain.flip(part) for count in range(len(axes) + 1) for part in itertools.combinations(axes, count)]
    seen = [next(k for k, one in enumerate(wanted) if torch.equal(one, patches[i]["image"])) for i in range(60)]
    assert set(seen) == set(range(len(wanted)))


@pytest.mark.parametrize(
    ("spacing", "axes"), [((1, 1, 1.5), (0, 1, 2)), ((1, 1, 1.6), (2,)), ((1.6, 1, 1), (0,)), ((1, 1.6, 1), (1,)), ((1, 2, 4), ())]
)
def test_rotation_is_around_axes_in_whose_plane_voxels_are_nearly_square(spacing, axes):
    angles = _rotations(dataclasses.replace(FITTED, spacing=spacing))
    assert [axis for axis, angle in enumerate(angles) if angle] == list(axes) and {angle for angle in angles if angle} <= {math.radians(15)}
    assert _rotations(dataclasses.replace(FITTED, patch=(4, 4), slice_axis=2, spacing=spacing)) == [math.radians(15)]


def test_about_a_seventh_of_the_patches_is_turned_and_sees_no_border():
    """The part that is cut for a turned patch is wide enough: in a large volume nothing is repeated from a border."""
    fitted = dataclasses.replace(FITTED, patch=(8, 8, 8))
    patches = Patches([volume(torch.zeros(40, 40, 40), fitted)], fitted)
    reached = []
    patches._crop = lambda *arguments: reached.append(arguments[2]) or Patches._crop(patches, *arguments)
    for i in range(200):
        assert patches[i]["image"].shape == (1, 8, 8, 8)
    assert 0.08 < np.mean([reach > 1 for reach in reached]) < 0.23
    assert max(reached) == pytest.approx(1.2 * (math.cos(math.pi / 12) + math.sin(math.pi / 12)))
    assert patches._crop(patches.volumes[0], np.array([20, 20, 20]), max(reached))["image"].shape == (1, 12, 12, 12)


def test_a_turned_patch_has_no_new_intensity_and_no_new_class(monkeypatch):
    """A volume as small as the patch: what lies outside repeats the border."""
    monkeypatch.setattr("medssm.segment.patches._TURNED", 1.0)
    fitted = dataclasses.replace(FITTED, patch=(8, 8, 8))
    label = torch.zeros(8, 8, 8)
    label[:4] = 2
    patches = Patches([volume(label, fitted, torch.full((1, 8, 8, 8), 3.0))], fitted)
    patches.intensity = Compose([])
    for patch in (patches[i] for i in range(20)):
        torch.testing.assert_close(patch["image"], torch.full((1, 8, 8, 8), 3.0))
        assert set(patch["label"].unique().tolist()) <= {0, 2}


def test_a_patch_is_scaled_as_the_whole_image_is():
    fitted = dataclasses.replace(FITTED, intensity=({"scheme": "zscore"},))
    image = torch.arange(64.0).reshape(1, 4, 4, 4)
    patch = Patches([volume(torch.zeros(4, 4, 4), fitted, image)], fitted, augment=False)[0]
    torch.testing.assert_close(patch["image"], scaling(image, fitted.intensity)(image))


def test_a_third_of_the_patches_is_centred_on_a_class_by_default():
    assert Patches([], FITTED).foreground == 1 / 3


# ---- inference


class Pointwise(nn.Module):
    """Logits that depend on a voxel's own value alone; counts its calls and windows and keeps the largest batch."""

    def __init__(self):
        super().__init__()
        self.calls = self.largest = self.windows = 0

    def forward(self, x):
        self.calls, self.largest, self.windows = self.calls + 1, max(self.largest, len(x)), self.windows + len(x)
        return torch.cat([0 * x, x, -x], 1)


@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
@pytest.mark.parametrize(("overlap", "batch"), [(0.0, 1), (0.3, 1), (0.5, 1), (0.5, 3), (0.75, 2), (0.9, 4)])
def test_windows_cover_the_volume_and_the_bar_reaches_its_end(slice_axis, overlap, batch):
    fitted = dataclasses.replace(FITTED, patch=(4,) * (3 if slice_axis is None else 2), slice_axis=slice_axis)
    image, network, shown = torch.randn(1, 9, 6, 3), Pointwise(), []
    found = probabilities(network, image, fitted, device=torch.device("cpu"), overlap=overlap, batch=batch, show=shown.append)
    torch.testing.assert_close(found, torch.cat([0 * image, image, -image]).softmax(0))
    assert network.calls == len(shown) and shown[-1] == 1 and shown == sorted(shown)
    assert network.largest <= batch and shown[0] == pytest.approx(network.largest / network.windows)


def test_by_default_windows_overlap_by_half_one_at_a_time_and_unmirrored():
    fitted, network, image = dataclasses.replace(FITTED, mirror=(0,)), Pointwise(), torch.zeros(1, 10, 4, 4)
    probabilities(network, image, fitted, device=torch.device("cpu"))
    assert (network.calls, network.largest) == (4, 1)  # windows begin at 0, 2, 4 and 6


def test_an_image_is_scaled_before_it_is_padded():
    """The margin of a small image gets the minimum of the scaled values, and the result has the image's own shape."""
    seen = []

    class Sees(Pointwise):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    fitted = dataclasses.replace(FITTED, intensity=({"scheme": "zscore"},))
    image = torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1).repeat(1, 1, 4, 4)
    found = probabilities(Sees(), image, fitted, device=torch.device("cpu"))
    assert found.shape == (3, 2, 4, 4) and seen[0][0, 0, :, 0, 0].tolist() == [-1, -1, 1, -1]


class Sided(nn.Module):
    """Logits that grow along one axis of a window, whatever is in it."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        ramp = torch.arange(float(x.shape[self.axis])).reshape([-1 if axis == self.axis else 1 for axis in range(x.ndim)])
        return torch.cat([0 * x, 0 * x + ramp, 0 * x], 1)


@pytest.mark.parametrize(
    ("slice_axis", "mirror", "axis", "symmetric"),
    [(None, (0,), 2, True), (None, (0,), 3, False), (None, (1, 2), 4, True), (0, (1,), 2, True), (0, (2,), 2, False), (0, (2,), 3, True)],
)
def test_mirroring_averages_over_the_mirrored_axes_alone(slice_axis, mirror, axis, symmetric):
    fitted = dataclasses.replace(FITTED, patch=(4,) * (3 if slice_axis is None else 2), slice_axis=slice_axis, mirror=mirror)
    image = torch.zeros(1, *fitted.volume_patch)
    plain, mirrored = (probabilities(Sided(axis), image, fitted, device=torch.device("cpu"), mirror=on) for on in (False, True))
    along = axis - 1 if slice_axis is None else [i for i in range(3) if i != slice_axis][axis - 2] + 1
    assert not torch.allclose(plain, plain.flip(along))
    torch.testing.assert_close(mirrored, (plain + plain.flip(along)) / 2 if symmetric else plain)


def test_windows_weigh_most_in_their_middle():
    """Where two windows overlap, the nearer one's middle counts more: the average is no plain mean."""

    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.cat([0 * x, 0 * x + self.calls, 0 * x], 1)

    found = probabilities(Counts(), torch.zeros(1, 6, 4, 4), FITTED, device=torch.device("cpu"))[1, :, 2, 2]
    one, other = (torch.tensor([0.0, float(value), 0.0]).softmax(0)[1] for value in (1, 2))
    torch.testing.assert_close(found[[0, 1, 4, 5]], torch.stack([one, one, other, other]))
    assert one < found[2] < (one + other) / 2 < found[3] < other


def test_half_precision_is_the_networks_alone():
    seen = []

    class Layer(nn.Conv3d):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    network = Layer(1, 3, 1)
    for half, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        found = probabilities(network, torch.randn(1, 4, 4, 4), FITTED, device=torch.device("cpu"), half=half)
        assert seen[-1] == dtype and found.dtype == torch.float32
        torch.testing.assert_close(found.sum(0), torch.ones(4, 4, 4), rtol=0, atol=1e-6)  # the softmax is taken in float32
