"""The direct road to a kernel, and what must not take it: modes that see every operator, tracers whose tensors mean nothing afterwards."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from medssm import ops, orders
from tests.ops.calls import DEVICE
from tests.ops.cases import available, example

KERNELS = [(op, backend) for op, backend in available() if backend != "reference"]
every_kernel = pytest.mark.parametrize("op, backend", KERNELS)


def output(result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


class FunctionMode(TorchFunctionMode):
    """Keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """Keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_kernel
@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_a_mode_sees_the_operator(op, backend, mode):
    """A call without gradients goes to the kernel at once, but not past a mode."""
    call = example(op)
    with torch.no_grad(), mode() as at_work:
        got = output(call.run(backend))
        assert f"medssm.{op}_forward.default" in at_work.seen
    torch.testing.assert_close(got, output(call.run(backend)))


def under_a_fake_mode(scan, x):
    with FakeTensorMode() as mode:
        return scan(mode.from_tensor(x))


def exported(scan, x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return scan(x)

    return torch.export.export(Module(), (x,)).module()(x)


def compiled(scan, x):
    torch._dynamo.reset()
    return torch.compile(scan, backend="aot_eager")(x)


@pytest.mark.parametrize("backend", [backend for op, backend in available() if op == "selective_scan"])
@pytest.mark.parametrize(
    "trace, order",
    [(under_a_fake_mode, orders.interleaved(2)), (exported, orders.interleaved(3)), (compiled, orders.interleaved(4))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_order_first_met_while_tracing_serves_later_calls(backend, trace, order):
    """An order's tables are kept from call to call; those of a trace are tensors of that trace alone. No other test has this shape."""

    def scan(x):
        B = x[..., :2]
        return ops.selective_scan(x, x.abs(), -torch.ones(3, 2, device=x.device), B, B, order=order, backend=backend)

    x = torch.randn((1, 1, 17, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert trace(scan, x).shape == x.shape
    got = scan(x)
    assert type(got) is torch.Tensor
    state, want = torch.zeros(3, 2, device=DEVICE), torch.empty_like(x)
    for place in order.index((1, 17)).tolist():
        token = x[0, 0, place]
        state = torch.exp(-token.abs())[:, None] * state + (token.abs() * token)[:, None] * token[:2]
        want[0, 0, place] = state @ token[:2]
    torch.testing.assert_close(got, want)
