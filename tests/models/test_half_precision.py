"""Training under bf16 autocast: no NaN where float32 has none, and the same labels."""

import pytest
import torch

from tests.models.test_models import ALL, CLASSIFIERS, build


@pytest.mark.each_network
@pytest.mark.parametrize("steps", [16, pytest.param(200, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ALL)
def test_every_step_is_finite_and_the_loss_falls(name, steps):
    """A few samples learned by heart with Adam, its steps large: the loss falls, and stays finite at every step."""
    torch.manual_seed(0)
    model = build(name, 2)
    x = torch.randn(4, 2, 32, 32)
    labels = torch.arange(4) % 3 if name in CLASSIFIERS else (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        loss = torch.nn.functional.cross_entropy(y.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses = torch.tensor(losses)
    assert losses.isfinite().all(), f"step {int((~losses.isfinite()).nonzero()[0])}"
    assert losses[-5:].mean() < losses[:5].mean()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["efficientvit_seg", "egeunet", "ultralight_vmunet"])
def test_networks_of_few_channels_compute_in_float32_on_a_cpu(name):
    """Where bf16 is slower."""
    torch.manual_seed(0)
    model, x = build(name, 2).eval(), torch.randn(1, 2, 33, 38)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), expected) and model(x.bfloat16()).dtype == torch.float32
        wide = build(name, 2, **({"size": "b1"} if name == "efficientvit_seg" else {"features": (8, 8, 8, 8, 8, 136)})).eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert wide(x).dtype == torch.bfloat16
