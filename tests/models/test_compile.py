"""torch.compile on every network: the compiled network gives what the network gives."""

import pytest
import torch

from medssm import models
from tests.conftest import KINDS
from tests.models.test_models import ALL, MONAIS, build

SIZE = {2: (32, 64), 3: (32, 32, 32)}
CASES = [(name, dims) for name in [*ALL, *MONAIS] for dims in models.model_facts(name).dims]


@pytest.fixture(autouse=True)
def forget():
    """Each network starts without the graphs of those before it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compared(name, dims, backend, **options):
    model = build(name, dims).eval()
    x = torch.randn(1, 2, *((32,) * dims if name == "monai_unetr" else SIZE[dims]))
    compiled = torch.compile(model, backend=backend, **options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "dims"), CASES)
def test_captured(name, dims):
    """As one graph, without code generation."""
    compared(name, dims, "aot_eager", fullgraph=True)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(KINDS))
def test_compiled(name):
    compared(name, 2, "inductor")
