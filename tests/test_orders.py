"""Scan orders: permutations, directions, beginnings, specs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssm import orders
from tests.ops.calls import any_order

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@given(data=st.data(), shape=shapes)
def test_every_order_is_a_permutation_and_reverse_turns_it_round(data, shape):
    order = data.draw(any_order(len(shape)))
    index = order.index(shape)
    assert index.dtype is torch.int64 and sorted(index.tolist()) == list(range(math.prod(shape)))
    turned = order.reversed()
    assert torch.equal(turned.index(shape), index.flip(0)) and turned.reversed() == order


@given(data=st.data(), shape=shapes)
def test_starts_are_the_same_segments_from_either_end(data, shape):
    order, length = data.draw(any_order(len(shape))), math.prod(shape)
    starts, back = order.starts(shape).tolist(), order.reversed().starts(shape).tolist()
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < length
    index = order.index(shape).tolist()
    segments = {frozenset(index[a:b]) for a, b in zip(starts, [*starts[1:], length], strict=True)}
    turned = order.reversed().index(shape).tolist()
    assert segments == {frozenset(turned[a:b]) for a, b in zip(back, [*back[1:], length], strict=True)}


@given(data=st.data(), dims=st.integers(1, 3))
def test_a_spec_gives_its_order_back(data, dims):
    order = data.draw(any_order(dims))
    assert orders.parse(order.spec) == order and hash(orders.parse(order.spec)) == hash(order)
    assert eval(repr(order), {"orders": orders}) == order


def test_raster_is_row_major_and_its_axes_transpose():
    assert orders.raster().index((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert orders.raster((1, 0)).index((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    volume = torch.arange(24).view(2, 3, 4)
    assert torch.equal(orders.raster((2, 0, 1)).index((2, 3, 4)), volume.permute(2, 0, 1).flatten())


@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple), data=st.data())
def test_snake_always_steps_to_a_neighbour(shape, data):
    order = orders.snake(data.draw(st.permutations(range(len(shape)))))
    assert (np.abs(np.diff(np.stack(np.unravel_index(order.index(shape).numpy(), shape)), axis=1)).sum(0) == 1).all()


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (4, 4, 4), (8, 8, 8)])
def test_hilbert_steps_to_a_neighbour_in_a_power_of_two(shape):
    assert (np.abs(np.diff(np.stack(np.unravel_index(orders.hilbert().index(shape).numpy(), shape)), axis=1)).sum(0) == 1).all()


def test_zigzag_is_jpegs():
    assert orders.zigzag().index((3, 3)).tolist() == [0, 1, 3, 6, 4, 2, 5, 7, 8]


def test_windows_and_phases_begin_anew():
    order = orders.window((2, 3))
    assert order.index((4, 3)).tolist() == list(range(12)) and order.starts((4, 3)).tolist() == [0, 6]
    order = orders.dilated(2)
    assert order.index((2, 4)).tolist() == [0, 2, 1, 3, 4, 6, 5, 7] and order.starts((2, 4)).tolist() == [0, 2, 4, 6]
    assert orders.window(4).starts((4, 4)).tolist() == [0] and orders.raster().starts((0, 4)).tolist() == []


def test_phases_fit_an_image_of_any_size():
    half, divide = orders.dilated(4, fit="half"), orders.dilated((2, 3), fit="divide", reverse=True)
    assert torch.equal(half.index((4, 9)), orders.dilated((2, 4)).index((4, 9))) and half.starts((1, 2)).tolist() == [0]
    assert torch.equal(divide.index((4, 3)), orders.dilated((2, 3), reverse=True).index((4, 3)))
    assert torch.equal(divide.index((4, 4)), orders.raster(reverse=True).index((4, 4)))
    assert orders.parse(divide.spec) == divide


def test_interleaved_is_chunk_stack_flatten():
    tokens = torch.arange(24)
    assert torch.equal(orders.interleaved(4).index((2, 3, 4)), torch.stack(tokens.chunk(4), -1).flatten())
    assert sorted(orders.interleaved(4).index((7,)).tolist()) == list(range(7))
    assert torch.equal(orders.interleaved().index((2, 3, 4)), orders.interleaved(2).index((2, 3, 4)))


def test_presets():
    x = torch.arange(12).view(3, 4)
    rows, columns = x.flatten(), x.T.flatten()
    assert [o.index((3, 4)).tolist() for o in orders.cross2d()] == [t.tolist() for t in (rows, columns, rows.flip(0), columns.flip(0))]
    assert [o.spec for o in orders.tri3d(8)] == ["raster()", "raster(reverse=True)", "interleaved(n=8)"]
    assert orders.tri3d()[2] == orders.parse("interleaved()")
    assert len(set(orders.axes3d())) == 6 and {o.parameters["axes"][-1] for o in orders.axes3d()} == {0, 1, 2}


def test_tables_are_copies():
    orders.snake().index((3, 4)).zero_()
    assert orders.snake().index((3, 4)).sum() == 66


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: orders.raster((0, 2)), "axes: expected a permutation of 0..1"),
        (lambda: orders.window(0), "size: expected a positive int"),
        (lambda: orders.dilated((2, -1)), "step: expected a positive int"),
        (lambda: orders.dilated(2, fit="whole"), "fit: expected None, 'half' or 'divide', got 'whole'"),
        (lambda: orders.interleaved((2, 2)), "n: expected a positive int"),
        (lambda: orders.parse("spiral()"), "spec: expected one of raster"),
        (lambda: orders.raster((0, 1)).index((2, 3, 4)), "walks 2 spatial axes"),
        (lambda: orders.window((2, 2)).index((4, 4, 4)), "has 2 values of size"),
        (lambda: orders.hilbert().index((5,)), "hilbert walks an image or a volume"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
