"""The score of a class, and the windows that hold it."""

import pytest
import torch
from torch import nn

from medssm.errors import UserError
from medssm.scratch import Store
from medssm.segment.explain.score import ClassScore, means, structure, windows_of, without_information
from medssm.segment.explain.sight import Run, Sight, deepest, middle
from medssm.segment.inference import Windows
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import Regions


def fitted(**given) -> Fitted:
    chosen = {"classes": {"background": 0, "ball": 3, "box": 5}, "patch": (8, 8, 8), "intensity": ({"scheme": "none"},)}
    return Fitted(channels=("MR",), spacing=(1.0, 1.0, 1.0), ignore=None, **(chosen | given))


def test_a_class_by_its_name_or_its_value():
    assert structure("box", fitted()) == structure("5", fitted()) == structure(5, fitted()) == ("box", (5,), 2)
    with pytest.raises(UserError, match=r"^explain: expected one of ball \(3\), box \(5\), got 2$"):
        structure(2, fitted())
    with pytest.raises(UserError, match="got background"):
        structure("background", fitted())
    named = fitted(classes={"background": 0, "2": 1, "1": 2})
    assert structure("1", named).values == (2,)  # a name comes first
    regions = fitted(classes={"background": 0, "a": 1, "b": 2}, regions=Regions({"whole": (1, 2), "core": (2,)}, (1, 2)))
    assert structure("whole", regions) == structure(1, regions) == ("whole", (1, 2), 0) and structure("core", regions).output == 1


def windows(shape, how, channels=1):
    image = torch.arange(channels * shape[0] * shape[1] * shape[2], dtype=torch.float32).reshape(shape[0], channels, *shape[1:])
    return Windows(Store.of(image), how, 0.5)


@pytest.mark.parametrize("shape", [(13, 20, 8), (5, 30, 4), (8, 8, 8)])
@pytest.mark.parametrize("axis", [None, 2])
def test_each_voxel_is_explained_in_one_window(shape, axis):
    how = fitted(slice_axis=axis, patch=(8, 8) if axis else (8, 8, 8))
    cut = windows(shape, how)
    found = torch.rand(shape) < 0.1
    counts = torch.zeros(shape, dtype=torch.int64)
    seen = windows_of(cut, found, how)
    for place, mask in seen:
        inside, at = (tuple(part) for part in cut.over(place))
        volume = mask if axis is None else mask.unsqueeze(axis)
        counts[at] += volume[inside]
        assert volume.sum() == volume[inside].sum()  # none lies around the image
    assert torch.equal(counts, found.long())
    sizes = [int(one.mask.sum()) for one in seen]
    assert sizes == sorted(sizes, reverse=True)


def test_the_deepest_window_of_a_voxel():
    how = fitted()
    cut = windows((20, 5, 8), how)
    one = Sight(Run(nn.Identity(), how), 1, None, cut, None, [])
    for x in range(20):
        place, at = deepest(one, (x, 2, 3))
        assert place[0].start + at[0] == x and at[1:] == (3, 3)  # the image begins one voxel behind the patch's edge
        assert abs(at[0] - 3.5) <= min(abs(x - start - 3.5) for start in {p[0].start for p in cut.places} if 0 <= x - start < 8) + 1e-6


def test_the_middle_is_a_voxel_of_the_class():
    ring = torch.zeros(9, 9, 3, dtype=torch.bool)
    ring[1:8, 1:8, 1] = True
    ring[2:7, 2:7, 1] = False
    assert ring[middle(ring)]


def test_input_and_baseline_differ_in_the_image_alone():
    how = fitted(intensity=({"scheme": "none"},) * 2)
    cut = windows((6, 8, 8), how, channels=2)
    levels = means(cut)
    torch.testing.assert_close(levels, cut.image[:].mean((0, 2, 3)))
    x, baseline, inside = without_information(cut, cut.places[0], how, levels)
    assert torch.equal(x[:, inside], cut.image[:].movedim(1, 0).flatten(1))
    assert inside.sum() == 6 * 64 and torch.equal(x[:, ~inside], baseline[:, ~inside])
    assert torch.equal(baseline[:, inside], levels[:, None].expand(2, 6 * 64))


@pytest.mark.parametrize("regions", [False, True])
def test_the_score_is_the_mean_logarithm_of_the_probability(regions):
    network, x = nn.Conv2d(1, 3, 3, padding=1), torch.randn(2, 1, 6, 6)
    mask = torch.rand(6, 6) < 0.4
    score = ClassScore(network, 2, regions, mask, 2 * int(mask.sum()))
    found = network(x).sigmoid() if regions else network(x).softmax(1)
    torch.testing.assert_close(score(x), found[:, 2].log()[:, mask].mean(1) / 2)
    torch.testing.assert_close(score.probability(x), found[:, 2][:, mask].mean(1))
    heads = ClassScore(lambda x: [network(x), network(x)[..., ::2, ::2]], 2, regions, mask, int(mask.sum()))
    torch.testing.assert_close(heads(x), 2 * score(x))
