"""peft's LoRA on the projections and convolutions inside a mixer."""

import copy

import pytest
import torch

from medssm.integrations.mamba_ssm import mixer as stand_in
from medssm.nn import SSND, Mamba, VSSBlock

peft = pytest.importorskip("peft", reason="peft is not installed: `make test-integrations` has it")


def adapted(module, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(init_lora_weights=False, **options))


def learned(module):
    """The names of what peft trains, each with a gradient."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    return {n.split(".")[-4] for n in trained}


@pytest.mark.parametrize("kind", [Mamba, stand_in.Mamba])
@pytest.mark.parametrize("targets", [["dt_proj"], ["x_proj"], ["in_proj", "out_proj"], ["dt_proj", "x_proj", "in_proj", "out_proj"]])
def test_lora_of_projections(kind, targets):
    """It counts, it can be switched off, it learns, and merging it into the weights changes nothing."""
    torch.manual_seed(0)
    mixer, x = kind(8, d_state=4).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    lora, want = adapted(mixer, target_modules=targets), mixer(x)
    out = lora(x)
    assert (out - want).abs().max() > 1e-6
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x), want)
    out.square().sum().backward()
    assert learned(lora) == set(targets)
    if kind is stand_in.Mamba:
        states = lora.allocate_inference_cache(2, None)
        torch.testing.assert_close(torch.cat([lora.step(x[:, t : t + 1], *states)[0] for t in range(7)], 1), out)
    torch.testing.assert_close(lora.merge_and_unload()(x), out)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("mixer, target, shape", [(Mamba(8, d_state=4), "conv1d", (5,)), (SSND(8, d_state=4), "conv2d", (3, 4))])
def test_lora_of_depthwise_convolutions(mixer, target, shape):
    """peft's rank is a multiple of the groups, and it cannot merge them."""
    x = torch.randn(2, *shape, 8)
    lora, want = adapted(mixer, target_modules=[target], r=16), mixer(x)
    out = lora(x)
    assert (out - want).abs().max() > 1e-6
    out.square().sum().backward()
    assert learned(lora) == {target}


def test_lora_of_weights_that_no_inner_layer_has():
    """SSND's, one for each order: peft has them as parameters."""
    torch.manual_seed(0)
    block, x = VSSBlock(8, d_state=4), torch.randn(1, 8, 3, 4)
    lora, want = adapted(block, target_modules=[], target_parameters=["op.x_proj_weight"], r=2), block(x)
    out = lora(x)
    assert (out - want).abs().max() > 1e-6
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters() if p.requires_grad)
