"""Every name that upstream's packages have can be imported from the stand-in; what is not there may be inherited from and says so on use."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medssm.integrations.mamba_ssm import absent, table
from tests.integrations.compare import draw, gradients, same

# What each module of mamba_ssm (and mamba_ssm 1's layernorm) and causal_conv1d defines, and what layers, models and interfaces offer by importing it.
UPSTREAM = json.loads((Path(__file__).parent / "mamba_ssm_names.json").read_text())


@pytest.mark.parametrize("module", UPSTREAM)
def test_every_name_of_upstream_imports(installed, module):
    found = importlib.import_module(module)
    missing = [name for name in UPSTREAM[module].split() if not hasattr(found, name)]
    assert not missing


def test_no_name_is_listed_as_absent_that_is_there():
    both = {module: set(names.split()) & set(table.PRESENT.get(module, {})) for module, names in absent.NAMES.items()}
    assert not any(both.values()), both


def test_the_compiled_modules_import_too(installed):
    for module in ("selective_scan_cuda", *(f"selective_scan_cuda_{kind}" for kind in ("core", "nrow", "oflex", "ndstate"))):
        assert callable(importlib.import_module(module).fwd) and callable(importlib.import_module(module).bwd)


def test_what_is_not_there_may_be_inherited_from_and_names_itself_on_use(installed):
    from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear
    from mamba_ssm.modules.mha import MHA
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd, init_to_zero
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd_kernel

    class Model(nn.Module, MHA):
        pass

    for use, name in (
        (lambda: ColumnParallelLinear(8, 8), "ColumnParallelLinear"),
        (lambda: _mamba_chunk_scan_combined_bwd(1), "_mamba_chunk_scan_combined_bwd"),
        (lambda: init_to_zero(["x"]), "init_to_zero"),
        (lambda: _state_passing_fwd_kernel[(1,)](1), "_state_passing_fwd_kernel"),
        (Model, "MHA"),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name} is not in this release of medssm, which stands in for mamba_ssm"):
            use()
    with pytest.raises(AttributeError, match=r"^MHA is not in this release"):
        Model.from_pretrained("weights")
    assert not isinstance(nn.Identity(), MHA) and not hasattr(MHA, "forward")


def test_autograd_functions_apply_the_functions(installed):
    import mamba_ssm.ops.selective_scan_interface as interface
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_fn
    from mamba_ssm.ops.triton import k_activations, layer_norm, layernorm_gated, ssd_combined

    u, delta, A, B, C, D, z, bias = (
        draw(2, 6, 7),
        draw(2, 6, 7),
        -torch.rand(6, 3).double(),
        draw(2, 3, 7),
        draw(2, 3, 7),
        draw(6),
        draw(2, 6, 7),
        draw(6),
    )
    x, weight = draw(2, 5, 8), draw(8)
    scan = (draw(2, 7, 4, 3), draw(2, 7, 4), -torch.rand(4).double(), draw(2, 7, 2, 5), draw(2, 7, 2, 5), 4)
    for fn, function, arguments in (
        (interface.SelectiveScanFn, interface.selective_scan_fn, (u, delta, A, B, C, D, z, bias, True)),
        (CausalConv1dFn, causal_conv1d_fn, (u, draw(6, 4), bias, None, None, False, None, "silu")),
        (layer_norm.LayerNormFn, layer_norm.layer_norm_fn, (x, weight, None)),
        (layer_norm.LayerNormLinearFn, layer_norm.layer_norm_linear_fn, (x, weight, None, draw(6, 8), None)),
        (layernorm_gated.LayerNormFn, layernorm_gated.layernorm_fn, (x, weight, None, draw(2, 5, 8))),
        (ssd_combined.MambaChunkScanCombinedFn, ssd_combined.mamba_chunk_scan_combined, scan),
        (k_activations.SwiGLU, k_activations.swiglu, (x,)),
    ):
        assert issubclass(fn, torch.autograd.Function)
        got, want = fn.apply(*arguments), function(*arguments)
        same([got], [want])
        leaves = [t for t in arguments if isinstance(t, torch.Tensor)]
        same(gradients(got, leaves), gradients(want, leaves))
    same([k_activations.swiglu(x)], [F.silu(x[..., :4]) * x[..., 4:]])


def test_twins_of_kernels_run_the_reference(installed):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    import medssm

    u, delta, A, B, C = draw(2, 6, 7), draw(2, 6, 7), -torch.rand(6, 3).double(), draw(2, 3, 7), draw(2, 3, 7)
    assert selective_scan_ref.__name__ == "selective_scan_ref"
    with medssm.use_backend("reference"):
        want = selective_scan_fn(u, delta, A, B, C)
    assert torch.equal(selective_scan_ref(u, delta, A, B, C), want)
    (du,) = torch.autograd.grad(selective_scan_ref(u, delta, A, B, C).square().sum(), delta, create_graph=True)
    assert du.square().sum().requires_grad  # twice differentiable, as the reference


# -- mamba_ssm.utils --------------------------------------------------------------------------------------------------------------


def test_functions_under_autocast_compute_in_its_type(installed):
    from mamba_ssm.utils.torch import custom_bwd, custom_fwd

    class Linear(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight)

        @staticmethod
        @custom_bwd
        def backward(ctx, dout):
            x, weight = ctx.saved_tensors
            product = dout @ weight  # in autocast's type again
            assert product.dtype is torch.bfloat16
            return product.float(), (dout.T @ x).float()

    class Wide(Linear):
        forward = staticmethod(custom_fwd(cast_inputs=torch.float32)(lambda ctx, x, weight: (x, F.linear(x, weight))[1]))

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = Linear.apply(x, weight)
        assert out.dtype is torch.bfloat16 and Wide.apply(x.bfloat16(), weight).dtype is torch.float32
    out.float().sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4), rtol=0.02, atol=0.02)


def test_deterministic_mode_and_its_memory(installed, monkeypatch):
    from types import SimpleNamespace

    from mamba_ssm.utils import determinism as d

    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    configs = [SimpleNamespace(kwargs={"BLOCK_SIZE_M": m, "num": 100}, num_stages=s) for m, s in ((64, 2), (32, 3), (128, 1))]
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        assert not d.use_deterministic_mode() and d.autotune_configs(configs) is configs
        torch.use_deterministic_algorithms(True)
        assert d.use_deterministic_mode() and d.autotune_configs(configs) == [configs[1]]
    finally:
        torch.use_deterministic_algorithms(before)
    monkeypatch.setitem(os.environ, "MAMBA_DETERMINISTIC", "1")
    assert d.use_deterministic_mode()
    d.set_deterministic_mode(False)
    assert not d.use_deterministic_mode()
    d.set_deterministic_mode(None)

    assert d.alloc_tile_workspace(None, 3, torch.float32, "cpu", True) == (None, 0) and d.finalize_tile_workspace(None, True) is None
    memory, stride = d.alloc_tile_workspace((2, 4), 3, torch.float32, "cpu", True)
    assert memory.shape == (2, 4, 3) and stride == 1 and not memory.any()
    memory += torch.arange(3.0)
    assert (d.finalize_tile_workspace(memory, True) == 3).all()
    memory, stride = d.alloc_tile_workspace((2, 4), 3, torch.float32, "cpu", False)
    assert memory.shape == (2, 4) and stride == 0 and d.finalize_tile_workspace(memory, False) is memory
