"""Probabilities from windows: as MONAI's, with the margin of a small image as in training, and mirrored along the axes of slices too."""

import itertools

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from medssm.segment import inference
from medssm.segment.inference import Pace, mirrorings, probabilities
from medssm.segment.preprocess import Fitted, pad

CPU = torch.device("cpu")


def fitted(patch, channels=1, **options):
    names = tuple(f"c{i}" for i in range(channels))
    return Fitted(names, (1, 1, 1), tuple({"scheme": "none"} for _ in names), {"background": 0, "a": 1, "b": 2}, None, patch, **options)


def network(dims, channels=1):
    """A layer that sees the neighbours, so that an answer depends on where its window begins."""
    torch.manual_seed(0)
    return (nn.Conv3d if dims == 3 else nn.Conv2d)(channels, 3, 3, padding=1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_windows_are_weighted_as_monais(overlap):
    layer, image = network(3), torch.randn(1, 20, 13, 8)
    found = probabilities(layer, image, fitted((8, 6, 5)), device=CPU, overlap=overlap)
    wanted = sliding_window_inference(image[None], (8, 6, 5), 1, lambda x: layer(x).softmax(1), overlap, "gaussian")[0]
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "patch"), [((5, 9, 4), (8, 9, 7)), ((24, 160, 160), (24, 160, 163))])  # the second is looked at in two slabs
def test_the_margin_of_a_small_image_is_that_of_training(shape, patch):
    """Each channel's own minimum, on both sides."""
    layer, image = network(3, 2), torch.randn(2, *shape) + torch.tensor([10.0, -20.0]).view(2, 1, 1, 1)
    image[:, :4].abs_()
    found = probabilities(layer, image, fitted(patch, 2), device=CPU)
    padded, inside = pad(image, patch)
    torch.testing.assert_close(found, layer(padded[None]).softmax(1)[0][(slice(None), *inside)].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", range(3))
def test_slices_across_any_axis_are_mirrored(axis):
    layer, image = network(2), torch.randn(1, 6, 5, 4)
    patch = tuple(n for i, n in enumerate((6, 5, 4)) if i != axis)
    found = probabilities(layer, image, fitted(patch, slice_axis=axis, mirror=(0, 1, 2)), device=CPU, mirror=True, batch=2)
    slices = image.movedim(axis + 1, 0)  # (slices, c, *patch)
    flips = [flip for count in range(3) for flip in itertools.combinations((2, 3), count)]
    wanted = torch.stack([layer(slices.flip(flip)).softmax(1).flip(flip) for flip in flips]).mean(0).movedim(0, axis + 1)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=0)


def test_the_number_of_windows_at_a_time_is_the_fastest_of_the_first_ones(monkeypatch):
    seconds = {1: 1.0, 2: 1.8, 4: 4.4}  # of a call
    now, calls, lines = [0.0], [], []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: now[0])
    layer = network(3)

    def slow(x):
        calls.append(len(x))
        now[0] += seconds[len(x)]
        return layer(x)

    pace, image = Pace(say=lines.append), torch.randn(1, 20, 13, 8)
    found = [probabilities(slow, image, fitted((8, 6, 5)), device=CPU, batch=batch) for batch in (pace, 1, pace)]
    assert calls[:7] == [1, 1, 2, 2, 4, 4, 2] and calls[-1] in (1, 2) and calls[-2] == 2
    assert lines == ["windows at a time: 2 (1: 1, 2: 0.9, 4: 1.1 s a window)"]
    for one in found:
        torch.testing.assert_close(one, found[1], atol=1e-6, rtol=0)


def test_large_windows_go_alone_and_a_given_number_is_kept(monkeypatch):
    assert Pace(3).count((128, 128, 128)) == 3
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert Pace().count((128, 128, 128)) == 1
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert Pace().count((8, 8, 8)) == 1  # other numbers may round otherwise


def test_sides_change_places_where_left_and_right_do():
    both = fitted((8, 8, 8), mirror=(0, 1), sides=((1, 2),))
    assert mirrorings(both, True) == [((), slice(None)), ((0,), [0, 2, 1]), ((1,), slice(None)), ((0, 1), [0, 2, 1])]
    assert mirrorings(both, False) == [((), slice(None))]
