"""The rows of packed sequences: both sides take the same tokens, and the packed one sees more than one sequence."""

import pytest
import torch

from medssm.bench import packed
from medssm.bench.row import OURS


@pytest.mark.parametrize("name", packed.ROWS)
def test_both_sides_take_the_same_tokens(name):
    sides = packed._rows(130, 3)[name].sides()
    ours, whole = sides[OURS](), sides[packed.WHOLE]()
    if not name.endswith("-train"):
        ours, whole = [ours], [whole]
    assert [t.shape for t in ours] == [t.shape for t in whole]
    assert not all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


def test_sequences_have_many_lengths():
    bounds = packed.bounds(1000, 8)
    assert bounds[0] == 0 and bounds[-1] == 1000 and len(bounds) == 9 and bounds.diff().min() > 0 and len(bounds.diff().unique()) > 4
