"""What the stand-in has: {module: {name: object}}, by upstream's module and name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import medssm
from medssm.integrations.mamba_ssm import (
    absent,
    amp,
    block,
    chunks,
    convolution,
    convolution_kernels,
    determinism,
    generation,
    kernels,
    language,
    norm,
    norm_gated,
    scan,
    ssd,
    third,
)
from medssm.integrations.mamba_ssm.mixer import Mamba
from medssm.integrations.mamba_ssm.second import Mamba2, Mamba2Simple


def _of(module: ModuleType, names: str) -> dict[str, Any]:
    """What our module has under upstream's names, which spaces separate."""
    return {name: getattr(module, name) for name in names.split()}


def _function(name: str, function: Callable[..., Any]) -> dict[str, type]:
    """Upstream's autograd function of that name: its `apply` is the function, and the gradients are those of the ops in it."""
    return {name: type(name, (torch.autograd.Function,), {"apply": staticmethod(function), "__doc__": function.__doc__})}


def _twin(name: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Upstream's plain PyTorch twin of a kernel (…_ref): the function with the reference of the ops in it."""

    @functools.wraps(function)
    def twin(*args: Any, **kwargs: Any) -> Any:
        with medssm.use_backend("reference"):
            return function(*args, **kwargs)

    twin.__name__ = name
    return {name: twin}


PRESENT: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"__version__": f"2.3.2+medssm.{medssm.__version__}", **_of(scan, "bimamba_inner_fn"), "Mamba2Simple": Mamba2Simple},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba, **_of(block, "Block")},
    "mamba_ssm.modules.block": _of(block, "Block"),
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.modules.mamba2_simple": {"Mamba2Simple": Mamba2Simple},
    "mamba_ssm.modules.mamba3": _of(third, "Mamba3 heavy_tail_activation"),
    "mamba_ssm.modules.mlp": _of(block, "GatedMLP"),
    "mamba_ssm.modules.ssd_minimal": {**_of(ssd, "ssd_minimal_discrete"), **_of(chunks, "segsum segsum_unstable")},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_of(scan, "selective_scan_fn mamba_inner_fn mamba_inner_fn_no_out_proj bimamba_inner_fn"),
        **_of(norm, "rms_norm_forward"),
        **_function("SelectiveScanFn", scan.selective_scan_fn),
        **_function("MambaInnerFn", scan.mamba_inner_fn),
        **_function("MambaInnerFnNoOutProj", scan.mamba_inner_fn_no_out_proj),
        **_function("BiMambaInnerFn", scan.bimamba_inner_fn),
        **_twin("selective_scan_ref", scan.selective_scan_fn),
        **_twin("mamba_inner_ref", scan.mamba_inner_fn),
        **_twin("bimamba_inner_ref", scan.bimamba_inner_fn),
        "_check_selective_scan_cuda": lambda: None,
    },
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo": _of(third, "mamba3_mimo"),
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.k_activations": {"swiglu": ssd.swiglu, **_function("SwiGLU", ssd.swiglu)},
    "mamba_ssm.ops.triton.layer_norm": {
        **_of(norm, "RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_ref"),
        **_function("LayerNormFn", norm.layer_norm_fn),
        **_function("LayerNormLinearFn", norm.layer_norm_linear_fn),
    },
    "mamba_ssm.ops.triton.layernorm": {  # the module of mamba_ssm 1
        **_of(norm, "RMSNorm layer_norm_linear_fn"),
        "layer_norm_fn": norm.layer_norm_fn_v1,
        "rms_norm_fn": norm.rms_norm_fn_v1,
        "layer_norm_ref": norm.layer_norm_ref_v1,
        "rms_norm_ref": norm.rms_norm_ref_v1,
        **_function("LayerNormFn", norm.layer_norm_fn_v1),
        **_function("LayerNormLinearFn", norm.layer_norm_linear_fn),
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        **_of(norm_gated, "RMSNorm LayerNorm rmsnorm_fn layernorm_fn rms_norm_ref"),
        **_function("LayerNormFn", norm_gated.layernorm_fn),
    },
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined": _of(third, "mamba3_siso_combined"),
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_step": _of(third, "mamba3_siso_step"),
    "mamba_ssm.ops.triton.selective_state_update": {
        **_of(scan, "selective_state_update"),
        **_twin("selective_state_update_ref", scan.selective_state_update),
    },
    "mamba_ssm.ops.triton.softplus": {"softplus": torch.nn.functional.softplus, "TRITON3": True},
    "mamba_ssm.ops.triton.ssd_bmm": {"_bmm_chunk_fwd": chunks.chunk_products},
    "mamba_ssm.ops.triton.ssd_chunk_scan": {
        "TRITON_22": False,
        "_chunk_scan_fwd": chunks.chunk_scan_packed,
        "chunk_scan": chunks.chunk_scan,
        "chunk_scan_ref": chunks.chunk_scan,
        **_function("ChunkScanFn", chunks.chunk_scan),
    },
    "mamba_ssm.ops.triton.ssd_chunk_state": {
        "_chunk_cumsum_fwd": chunks.chunk_cumsum,
        "_chunk_state_fwd": chunks.chunk_state_packed,
        "chunk_state": chunks.chunk_state,
        "chunk_state_ref": chunks.chunk_state,
        "chunk_state_varlen": chunks.chunk_state_varlen,
        **_function("ChunkStateFn", chunks.chunk_state),
    },
    "mamba_ssm.ops.triton.ssd_state_passing": {
        "_state_passing_fwd": chunks.state_passing_packed,
        "state_passing": chunks.state_passing,
        "state_passing_ref": chunks.state_passing,
        **_function("StatePassingFn", chunks.state_passing),
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "TRITON_22": False,
        **_of(ssd, "mamba_chunk_scan_combined mamba_chunk_scan mamba_split_conv1d_scan_combined ssd_selective_scan ensure_stride"),
        **_of(ssd, "mamba_chunk_scan_combined_varlen"),  # vLLM's
        **_function("MambaChunkScanCombinedFn", ssd.mamba_chunk_scan_combined),
        **_function("MambaSplitConv1dScanCombinedFn", ssd.mamba_split_conv1d_scan_combined),
        **_twin("ssd_chunk_scan_combined_ref", ssd.mamba_chunk_scan),
        **_twin("mamba_conv1d_scan_ref", ssd.mamba_conv1d_scan_ref),
        **_twin("mamba_split_conv1d_scan_ref", ssd.mamba_split_conv1d_scan_ref),
    },
    "mamba_ssm.distributed": {},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _of(language, "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": {**_of(block, "create_block"), **_of(language, "_init_weights MixerModel MambaLMHeadModel")},
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.determinism": {
        "TRITON_HAS_CACHE_RESULTS": False,
        "TRITON_VERSION": None,
        "_estimate_config_cost": determinism.cost,
        **_of(determinism, "use_deterministic_mode set_deterministic_mode autotune_configs alloc_tile_workspace finalize_tile_workspace"),
    },
    "mamba_ssm.utils.generation": {
        **_of(generation, "InferenceParams GenerationMixin GenerateDecoderOnlyOutput decode sample modify_logit_for_repetition_penalty"),
        **_of(generation, "modify_logits_for_min_p_filtering modify_logits_for_top_k_filtering modify_logits_for_top_p_filtering"),
    },
    "mamba_ssm.utils.hf": _of(language, "load_config_hf load_state_dict_hf"),
    "mamba_ssm.utils.torch": _of(amp, "custom_amp_decorator custom_fwd custom_bwd"),
    "causal_conv1d": {"__version__": f"1.6.1+medssm.{medssm.__version__}"},
    "causal_conv1d.causal_conv1d_interface": {
        **_of(convolution, "causal_conv1d_fn causal_conv1d_update"),
        **_function("CausalConv1dFn", convolution.causal_conv1d_fn),
        **_twin("causal_conv1d_ref", convolution.causal_conv1d_ref),
        **_twin("causal_conv1d_update_ref", convolution.causal_conv1d_update),
    },
    "causal_conv1d.causal_conv1d_varlen": {
        "causal_conv1d_varlen_states": convolution.causal_conv1d_varlen_states,
        "causal_conv1d_varlen_states_ref": convolution.causal_conv1d_varlen_states,
    },
    "causal_conv1d.cpp_functions": {
        "LIBRARY_NAME": "DaoAILab",
        **_of(convolution_kernels, "causal_conv1d_fwd_function causal_conv1d_bwd_function causal_conv1d_update_function"),
    },
    "causal_conv1d_cuda": _of(convolution_kernels, "causal_conv1d_fwd causal_conv1d_bwd causal_conv1d_update"),
    "selective_scan_cuda": {"fwd": kernels.fwd, "bwd": kernels.bwd},
    "selective_scan_cuda_core": {"fwd": kernels.core_fwd, "bwd": kernels.core_bwd},
    "selective_scan_cuda_nrow": {"fwd": kernels.core_fwd, "bwd": kernels.core_bwd},
    "selective_scan_cuda_oflex": {"fwd": kernels.oflex_fwd, "bwd": kernels.oflex_bwd},
    "selective_scan_cuda_ndstate": {"fwd": kernels.ndstate_fwd, "bwd": kernels.ndstate_bwd},
}

# What upstream's modules have besides, since they import it from another: {module: {that other one: names, as=name where it is renamed}}.
_CONVOLUTION = {"causal_conv1d.causal_conv1d_interface": "causal_conv1d_fn causal_conv1d_update"}
_KERNELS = {"causal_conv1d.cpp_functions": "causal_conv1d_fwd_function causal_conv1d_bwd_function causal_conv1d_update_function"}
_IMPORTED: dict[str, dict[str, str]] = {
    "causal_conv1d": _CONVOLUTION,
    "causal_conv1d.causal_conv1d_interface": _KERNELS,
    "mamba_ssm.modules.block": {"mamba_ssm.ops.triton.layer_norm": "RMSNorm layer_norm_fn"},
    "mamba_ssm.modules.mamba_simple": {
        **_CONVOLUTION,
        "mamba_ssm.ops.selective_scan_interface": "selective_scan_fn mamba_inner_fn",
        "mamba_ssm.ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn",
        "mamba_ssm.ops.triton.selective_state_update": "selective_state_update",
    },
    "mamba_ssm.modules.mamba2": {
        **_CONVOLUTION,
        "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen_states",
        "mamba_ssm.distributed.distributed_utils": "all_reduce reduce_scatter",
        "mamba_ssm.distributed.tensor_parallel": "ColumnParallelLinear RowParallelLinear",
        "mamba_ssm.ops.triton.layernorm_gated": "RMSNormGated=RMSNorm",
        "mamba_ssm.ops.triton.selective_state_update": "selective_state_update",
        "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined mamba_split_conv1d_scan_combined",
    },
    "mamba_ssm.modules.mamba2_simple": {
        "causal_conv1d.causal_conv1d_interface": "causal_conv1d_fn",
        "mamba_ssm.ops.triton.layernorm_gated": "RMSNormGated=RMSNorm LayerNorm",
        "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined mamba_split_conv1d_scan_combined",
    },
    "mamba_ssm.modules.mamba3": {
        "mamba_ssm.ops.cute.mamba3.mamba3_step_fn": "mamba3_step_fn",
        "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo": "mamba3_mimo_combined=mamba3_mimo",
        "mamba_ssm.ops.triton.layernorm_gated": "RMSNormGated=RMSNorm",
        "mamba_ssm.ops.triton.mamba3.mamba3_mimo_rotary_step": "apply_rotary_qk_inference_fwd",
        "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined": "mamba3_siso_combined",
    },
    "mamba_ssm.modules.mha": _CONVOLUTION,
    "mamba_ssm.modules.ssd_minimal": {"mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined"},
    "mamba_ssm.models.mixer_seq_simple": {
        "mamba_ssm.models.config_mamba": "MambaConfig",
        "mamba_ssm.modules.block": "Block",
        "mamba_ssm.modules.mamba_simple": "Mamba",
        "mamba_ssm.modules.mamba2": "Mamba2",
        "mamba_ssm.modules.mamba3": "Mamba3",
        "mamba_ssm.modules.mha": "MHA",
        "mamba_ssm.modules.mlp": "GatedMLP",
        "mamba_ssm.ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn",
        "mamba_ssm.utils.generation": "GenerationMixin",
        "mamba_ssm.utils.hf": "load_config_hf load_state_dict_hf",
    },
    "mamba_ssm.ops.selective_scan_interface": {
        "causal_conv1d.causal_conv1d_interface": "causal_conv1d_fn",
        **_KERNELS,
        "mamba_ssm.utils.torch": "custom_fwd custom_bwd",
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "causal_conv1d.causal_conv1d_interface": "causal_conv1d_fn",
        **_KERNELS,
        "mamba_ssm.ops.triton.layernorm_gated": "rmsnorm_fn _layer_norm_fwd _layer_norm_bwd",
        "mamba_ssm.ops.triton.k_activations": "_swiglu_fwd _swiglu_bwd",
        "mamba_ssm.ops.triton.ssd_bmm": "_bmm_chunk_fwd _bmm_chunk_bwd",
        "mamba_ssm.ops.triton.ssd_chunk_scan": "_chunk_scan_fwd chunk_scan chunk_scan_ref",
        "mamba_ssm.ops.triton.ssd_chunk_state": "_chunk_cumsum_fwd _chunk_state_fwd chunk_state chunk_state_ref chunk_state_varlen",
        "mamba_ssm.ops.triton.ssd_state_passing": "_state_passing_fwd state_passing state_passing_ref",
        "mamba_ssm.utils.torch": "custom_fwd custom_bwd",
    },
    "mamba_ssm": {
        "mamba_ssm.models.mixer_seq_simple": "MambaLMHeadModel",
        "mamba_ssm.modules.mamba_simple": "Mamba",
        "mamba_ssm.modules.mamba2": "Mamba2",
        "mamba_ssm.modules.mamba3": "Mamba3",
        "mamba_ssm.ops.selective_scan_interface": "selective_scan_fn mamba_inner_fn",
    },
}

MODULES: dict[str, dict[str, Any]] = {
    module: {**absent.absent(absent.NAMES.get(module, "")), **PRESENT.get(module, {})} for module in {**PRESENT, **absent.NAMES}
}
for _module, _sources in _IMPORTED.items():
    for _source, _names in _sources.items():
        for _name in _names.split():
            _as, _, _there = _name.partition("=")
            MODULES[_module][_as] = MODULES[_source][_there or _as]
PACKAGES = tuple(name for name in MODULES if "." not in name)
