"""Schemes by name, by modality and by what the values look like; padding that must not count."""

import dataclasses

import numpy as np
import pytest
import torch

from medssm import cli
from medssm.errors import UserError
from medssm.segment import intensity
from medssm.segment.intensity import Intensities, looks_like_ct, padding_below, scaling, scaling_of_parts, scheme_of, schemes
from medssm.segment.preprocess import Fitted
from tests.segment.synthetic import WORDS, nnunet_folder, write
from tests.segment.test_train_input import read

SHAPE = (20, 18, 16)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "ct") for name in ("CT", "ct", "CTA", "CT_arterial", "ceCT CT", "cbct", "Computed Tomography", "NCCT")),
        *((name, "zscore") for name in ("MR", "MRI", "T1", "T1w", "T2", "FLAIR", "T1ce", "ADC", "PET", "cine-MR")),
        ("noNorm", "none"),
        *((name, None) for name in ("channel_0", "image", "A", "PET/CT", "contrast", "actor")),
    ],
)
def test_a_channels_name_tells_its_scheme(name, scheme):
    assert scheme_of(name) == scheme


def test_the_modality_wins_over_names():
    assert schemes(("CT", "x"), None) == ["ct", None]
    assert schemes(("CT", "x"), ["other"]) == ["zscore", "zscore"]
    assert schemes(("CT", "x"), ["none", "ct"]) == ["none", "ct"]
    for wrong in (["ct", "ct", "ct"], ["xray"], []):
        with pytest.raises(UserError, match=r"modality: expected ct, mri, other, none, picture: one, or one for each of 2 channel\(s\)"):
            schemes(("CT", "x"), wrong)


def hounsfield(seed, shape=SHAPE):
    """A body of water, fat and bone in air."""
    random = np.random.default_rng(seed)
    image = np.full(shape, -1000.0) + random.normal(0, 15, shape)
    image[3:-3, 3:-3, 3:-3] = random.normal(40, 20, tuple(n - 6 for n in shape))
    image[5:8, 5:8, 5:8] = random.normal(700, 100, (3, 3, 3))
    return image.astype(np.float32)


def ct(seed, image, label):
    return hounsfield(seed, label.shape)[..., None], label


def test_what_looks_like_ct():
    random = torch.Generator().manual_seed(0)
    assert looks_like_ct(torch.from_numpy(hounsfield(0)))
    for other in (torch.randn(SHAPE, generator=random), 300 + 50 * torch.randn(SHAPE, generator=random), torch.zeros(SHAPE)):
        assert not looks_like_ct(other)
    padded = torch.zeros(SHAPE).bool()
    padded[:3] = True
    for padding in (-2000.0, -3024.0, -32768.0):
        assert looks_like_ct(torch.from_numpy(hounsfield(0)).masked_fill(padded, padding))
        assert not looks_like_ct((300 + 50 * torch.randn(SHAPE, generator=random)).masked_fill(padded, padding))
    body = torch.from_numpy(hounsfield(0))
    assert looks_like_ct(body.masked_fill(body < -900, -1024.0))  # air of one value is air


def mixture(length=10_000, **shares: int) -> torch.Tensor:
    """Values 50 with `shares` of others: `m850=100` is a hundred times -850."""
    values = torch.full((length,), 50.0)
    for i, (name, count) in enumerate(shares.items()):
        values[2000 * i : 2000 * i + count] = float(name.replace("m", "-").replace("p", ""))
    return values


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"m1000": 101, "p200": 11}, True),  # a hundredth air and a thousandth bone
        ({"m1000": 99, "p200": 11}, False),
        ({"m1000": 101, "p200": 9}, False),
        ({"m850": 101, "p200": 11}, False),  # no air
        ({"m1150": 101, "p200": 11}, False),
        ({"m850": 501, "p200": 11}, True),  # much lung
        ({"m99": 1900, "p200": 11}, False),
    ],
)
def test_shares_of_what_looks_like_ct(shares, expected):
    assert looks_like_ct(mixture(**shares)) is expected


def test_ct_is_fitted_to_the_foreground_of_each_channel():
    """Ignored voxels (-1) are no foreground, and a channel of one value is not divided by zero."""
    image, label = torch.zeros(2, 10, 10, 10), torch.zeros(10, 10, 10, dtype=torch.int16)
    image[0, :2], image[1], label[:2] = torch.linspace(0, 199, 200).view(2, 10, 10), 7.0, 1
    image[0, 2], label[2] = 5000.0, -1
    looked = Intensities(("CT", "CT"), None, 0)
    looked.add("a", image, label)
    first, second = looked.fit()
    assert first == {
        "scheme": "ct",
        "low": pytest.approx(0.5, abs=1),
        "high": pytest.approx(198.5, abs=1),
        "mean": pytest.approx(99.5, abs=1),
        "deviation": pytest.approx(57.7, abs=0.5),
    }
    assert second == {"scheme": "ct", "low": 7.0, "high": 7.0, "mean": 7.0, "deviation": 1.0}
    scaled = scaling(image, (first, second))(image)
    assert scaled[0].max().item() == pytest.approx((first["high"] - first["mean"]) / first["deviation"], rel=1e-5) and not scaled[1].any()


def test_ct_under_an_unknown_name_is_asked_about(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE, channels=("scan",), edit=ct)
    with pytest.raises(
        UserError, match=r"case_0_0000.nii.gz: the channel 'scan' has values as of CT in Hounsfield units.*--modality ct, or --modality other"
    ):
        read(folder)
    assert read(folder, modality=["other"])[0].intensity == ({"scheme": "zscore"},)
    assert read(folder, modality=["ct"])[0].intensity[0]["scheme"] == "ct"
    named = nnunet_folder(tmp_path / "named", cases=2, shape=SHAPE, channels=("CTA",), edit=ct)
    assert read(named)[0].intensity == read(folder, modality=["ct"])[0].intensity


def test_the_command_takes_modalities(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE, channels=("scan",), edit=ct)
    words = [*WORDS, "--max-steps", "1"]
    assert cli.main(["train", str(folder), str(tmp_path / "run"), *words, "--modality", "ct", "--quiet"]) == 0
    assert Fitted.load(tmp_path / "run" / "fitted.json").intensity[0]["scheme"] == "ct"


@pytest.mark.parametrize("padding", [-2000.0, -3024.0, -32768.0])
@pytest.mark.parametrize("share", [1, 5])
def test_padding_counts_for_nothing(padding, share):
    """A scan with a padded margin is scaled as the scan without it, and its padding is as dark as air."""
    plain = torch.from_numpy(hounsfield(1))[None]
    padded = plain.clone()
    padded[:, :share] = padding
    how, want = (scaling(image, [{"scheme": "zscore"}]) for image in (padded, plain[:, share:]))
    torch.testing.assert_close((how.mean, how.deviation), (want.mean, want.deviation), rtol=1e-5, atol=1e-3)
    scaled = how(padded)
    torch.testing.assert_close(scaled[:, share:], want(plain)[:, share:], rtol=1e-4, atol=1e-4)
    assert (scaled[:, :share] - scaled[:, share:].amin()).abs().max() < 1e-4


def test_nothing_is_taken_for_padding_that_is_none():
    random = torch.Generator().manual_seed(0)
    brain = 300 + 50 * torch.randn(SHAPE, generator=random)
    brain[:8] = 0
    for values in (brain, torch.from_numpy(hounsfield(1)), torch.from_numpy(hounsfield(1)).clamp(min=-1000), torch.zeros(SHAPE), torch.randn(SHAPE)):
        assert padding_below(values) is None


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        (torch.cat([torch.full((50,), -300.0), torch.linspace(0, 100, 9950)]), -48),  # a two-hundredth of all voxels
        (torch.cat([torch.full((49,), -300.0), torch.linspace(0, 100, 9951)]), None),
        (torch.cat([torch.full((500,), -47.0), torch.linspace(0, 100, 9500)]), None),  # near the others
        (torch.cat([torch.full((500,), -49.0), torch.linspace(0, 100, 9500)]), -48),
        (torch.cat([torch.full((500,), 10.0), torch.linspace(400, 500, 9500)]), None),  # not below zero
        (torch.cat([torch.full((500,), -150.0), torch.zeros(9000), torch.linspace(100, 200, 500)]), 52),  # zeros are padding too, of another kind
    ],
)
def test_padding_is_one_value_far_below_the_others(values, bound):
    found = padding_below(values)
    assert found is None if bound is None else found == pytest.approx(bound, abs=1.5)


def test_a_channel_of_zeros_is_left_as_it_is():
    image = torch.stack([torch.randn(4, 4, 4), torch.zeros(4, 4, 4)])
    assert not scaling(image, [{"scheme": "zscore"}] * 2)(image)[1].any()


def test_an_image_of_one_value_is_an_error(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE, edit=lambda seed, image, label: (image if seed else np.full_like(image, 7), label))
    with pytest.raises(UserError, match=r"case_0_0000.nii.gz: every voxel of the image is 7"):
        read(folder)


def test_planes_under_a_3d_network_are_an_error(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=(20, 18, 1))
    with pytest.raises(UserError, match=r"spatial_dims: .*case_0_0000.nii.gz and all other cases are planes: pass --spatial-dims 2"):
        read(folder)


def test_a_case_in_another_unit_of_length_is_named(tmp_path):
    folder = nnunet_folder(tmp_path, cases=3, shape=SHAPE)
    image, label = (folder / part for part in ("imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"))
    for path in (image, label):
        write(path, np.zeros(SHAPE, np.float32 if path is image else np.uint8), np.diag([1e-3, 1e-3, 1e-3, 1]))
    with pytest.raises(UserError, match=r"case_1_0000.nii.gz: voxels of 0.001 x 0.001 x 0.001 mm, where the median of the cases is 1 x 1 x 1 mm"):
        read(folder)


# -- mirroring


@pytest.mark.parametrize(
    ("mirror", "classes", "axes", "sides"),
    [
        ("auto", ("lkid", "rkid"), (), ()),
        ("auto", ("LV", "RV"), (), ()),
        ("auto", ("L5", "S1"), (0,), ()),
        ("auto", ("class_1", "class_2"), (), ()),
        ("swap", ("lkid", "rkid"), (0,), ((1, 2),)),
        ("swap", ("liver", "spleen"), (0,), ()),
    ],
)
def test_what_is_mirrored(tmp_path, mirror, classes, axes, sides):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels={"background": 0, **{name: i + 1 for i, name in enumerate(classes)}})
    fitted, _ = read(folder, mirror=mirror)
    assert fitted.mirror == axes and fitted.sides == sides
    fitted.save(tmp_path / "fitted.json")
    assert Fitted.load(tmp_path / "fitted.json") == fitted


def test_swapping_needs_both_sides(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels={"background": 0, "left atrium": 1, "aorta": 2})
    with pytest.raises(UserError, match="mirror: swap exchanges pairs of classes; left atrium has a side and no partner"):
        read(folder, mirror="swap")


def test_labels_change_places_with_left_and_right(tmp_path):
    """Patches with swapped sides: class 1 lies left of class 2 in every one of them, mirrored or not."""
    from medssm.segment.patches import Patches

    def halves(seed, image, label):
        label = np.ones(SHAPE, np.uint8)
        label[SHAPE[0] // 2 :] = 2
        return (label[..., None] * 100 + np.arange(SHAPE[0])[:, None, None, None]).astype(np.float32), label

    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels={"background": 0, "left": 1, "right": 2}, edit=halves)
    fitted, volumes = read(folder, mirror="swap", patch=SHAPE)
    patches = Patches(volumes, fitted, augment=False)
    mirrored = 0
    for patch in (patches[i] for i in range(12)):
        label = patch["label"][0]
        assert (label[: SHAPE[0] // 2] == 1).all() and (label[SHAPE[0] // 2 :] == 2).all()
        mirrored += bool(patch["image"][0, 0, 0, 0] > patch["image"][0, -1, 0, 0])
    assert 0 < mirrored < 12


def test_predictions_are_averaged_over_swapped_sides():
    """A network that finds class 1 in the left half of whatever it sees gives the same answer with mirroring: its mirrored answer is class 2's."""
    from medssm.segment.inference import probabilities

    class Halves(torch.nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 3, *x.shape[2:])
            middle = x.shape[2] // 2
            logits[:, 1, :middle] = 9
            logits[:, 2, middle:] = 9
            return logits

    fitted = Fitted(("MR",), (1.0,) * 3, ({"scheme": "none"},), {"background": 0, "left": 1, "right": 2}, None, (8, 8, 8), None, (0,), ((1, 2),))
    image = torch.randn(1, 8, 8, 8)
    plain, mirrored = (probabilities(Halves(), image, fitted, device=torch.device("cpu"), mirror=mirror) for mirror in (False, True))
    torch.testing.assert_close(plain, mirrored)


# -- progress in a log


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    from medssm.segment import progress

    times = iter([0.0, 0.0, 10.0, 31.0, 40.0, 3700.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.progress("predicting") as show:
        for fraction in (0.1, 0.25, 0.5, 1.0):
            show(fraction, "case_1")
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 25%, case_1, 0:00:31 passed, 0:01:33 to go",
        "predicting: 100%, case_1, 1:01:40 passed",
    ]
    with progress.progress("predicting", quiet=True) as show:
        show(0.5, "case_1")
    assert not capsys.readouterr().err


def test_quantiles_are_of_the_same_voxels_in_pieces(monkeypatch):
    monkeypatch.setattr(intensity, "_LOOKED_AT", 100)
    values = torch.arange(1003.0)
    for size in (7, 11, 64, 1003):
        assert intensity._some_of_parts(values.split(size), len(values)).tolist() == intensity._some(values).tolist() == values[::11].tolist()


def test_an_image_in_pieces_is_scaled_as_one_in_memory():
    image = torch.randn(2, 40, 50, 60) * 100 + 30
    image[:, :10] = -3024
    image[1, 20:25] = 0
    how = [{"scheme": "zscore"}, {"scheme": "zscore"}]
    inside = image[1][(image[1] != 0) & (image[1] > -3024)].double()
    whole = scaling(image, how)
    assert whole.mean[1].item() == pytest.approx(inside.mean().item(), rel=1e-6)
    assert whole.deviation[1].item() == pytest.approx(inside.std(correction=0).item(), rel=1e-6)
    pieces = scaling_of_parts(lambda c: image[c].flatten().split(777), image[0].numel(), how)
    for one, other in zip(dataclasses.astuple(whole), dataclasses.astuple(pieces), strict=True):
        torch.testing.assert_close(one, other)
