"""What the stand-in has: {module: {name: object}}, by upstream's module and name."""

from __future__ import annotations

from typing import Any

import medssm
from medssm.integrations.mamba_ssm import kernels, norm_gated
from medssm.integrations.mamba_ssm.absent import absent
from medssm.integrations.mamba_ssm.block import Block, GatedMLP, create_block
from medssm.integrations.mamba_ssm.convolution import causal_conv1d_fn, causal_conv1d_update
from medssm.integrations.mamba_ssm.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    InferenceParams,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from medssm.integrations.mamba_ssm.language import MambaConfig, MambaLMHeadModel, MixerModel, _init_weights, load_config_hf, load_state_dict_hf
from medssm.integrations.mamba_ssm.mixer import Mamba
from medssm.integrations.mamba_ssm.norm import RMSNorm, layer_norm_fn, layer_norm_fn_v1, rms_norm_fn, rms_norm_fn_v1
from medssm.integrations.mamba_ssm.scan import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj, selective_scan_fn, selective_state_update
from medssm.integrations.mamba_ssm.second import Mamba2, Mamba2Simple
from medssm.integrations.mamba_ssm.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, ssd_minimal_discrete


def _by_name(*objects: Any) -> dict[str, Any]:
    return {thing.__name__: thing for thing in objects}


# Upstream's plain-PyTorch twins of its kernels (..._ref) are the same functions here.
_SCAN = {"selective_scan_fn": selective_scan_fn, "mamba_inner_fn": mamba_inner_fn, "bimamba_inner_fn": bimamba_inner_fn}
_SCAN_TWINS = {"selective_scan_ref": selective_scan_fn, "mamba_inner_ref": mamba_inner_fn, "bimamba_inner_ref": bimamba_inner_fn}
_CONVOLUTION = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
_CONVOLUTION_TWINS = {"causal_conv1d_ref": causal_conv1d_fn, "causal_conv1d_update_ref": causal_conv1d_update}
_LANGUAGE = _by_name(MambaLMHeadModel)
_SECOND = {"Mamba2": Mamba2, "Mamba2Simple": Mamba2Simple}

MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"__version__": f"2.2.4+medssm.{medssm.__version__}", "Mamba": Mamba, **_SCAN, **_SECOND, **_LANGUAGE},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba, "Block": Block},
    "mamba_ssm.modules.block": {"Block": Block},
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.modules.mamba2_simple": {"Mamba2Simple": Mamba2Simple},
    "mamba_ssm.modules.ssd_minimal": {"ssd_minimal_discrete": ssd_minimal_discrete},
    "mamba_ssm.modules.mha": absent("MHA"),
    "mamba_ssm.modules.mlp": {"GatedMLP": GatedMLP},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {**_SCAN, **_SCAN_TWINS, "mamba_inner_fn_no_out_proj": mamba_inner_fn_no_out_proj},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": {"RMSNorm": RMSNorm, "layer_norm_fn": layer_norm_fn, "rms_norm_fn": rms_norm_fn},
    "mamba_ssm.ops.triton.layernorm": {"RMSNorm": RMSNorm, "layer_norm_fn": layer_norm_fn_v1, "rms_norm_fn": rms_norm_fn_v1},
    "mamba_ssm.ops.triton.layernorm_gated": {
        "RMSNorm": norm_gated.RMSNorm,
        "LayerNorm": norm_gated.LayerNorm,
        "rmsnorm_fn": norm_gated.rmsnorm_fn,
        "layernorm_fn": norm_gated.layernorm_fn,
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": selective_state_update,
        "selective_state_update_ref": selective_state_update,
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        **absent("mamba_chunk_scan"),
    },
    "mamba_ssm.distributed": {},  # which copies of upstream's Mamba2 import, and use with a process group alone
    "mamba_ssm.distributed.distributed_utils": absent("all_reduce", "reduce_scatter"),
    "mamba_ssm.distributed.tensor_parallel": absent("ColumnParallelLinear", "RowParallelLinear"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _by_name(MambaConfig),
    "mamba_ssm.models.mixer_seq_simple": _by_name(create_block, _init_weights, MambaConfig, MixerModel, MambaLMHeadModel),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        **_by_name(InferenceParams, GenerationMixin, GenerateDecoderOnlyOutput, decode, sample, modify_logit_for_repetition_penalty),
        **_by_name(modify_logits_for_min_p_filtering, modify_logits_for_top_k_filtering, modify_logits_for_top_p_filtering),
        **absent("DecodingCGCache", "update_graph_cache", "capture_graph"),
    },
    "mamba_ssm.utils.hf": _by_name(load_config_hf, load_state_dict_hf),
    "causal_conv1d": {"__version__": f"1.4.0+medssm.{medssm.__version__}", **_CONVOLUTION},
    "causal_conv1d.causal_conv1d_interface": {**_CONVOLUTION, **_CONVOLUTION_TWINS},
    "causal_conv1d.causal_conv1d_varlen": absent("causal_conv1d_varlen_states"),
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": kernels.causal_conv1d_fwd,
        "causal_conv1d_bwd": kernels.causal_conv1d_bwd,
        "causal_conv1d_update": kernels.causal_conv1d_update,
    },
    "selective_scan_cuda": {"fwd": kernels.fwd, "bwd": kernels.bwd},
    "selective_scan_cuda_core": {"fwd": kernels.core_fwd, "bwd": kernels.core_bwd},
    "selective_scan_cuda_oflex": {"fwd": kernels.oflex_fwd, "bwd": kernels.oflex_bwd},
    "selective_scan_cuda_ndstate": {"fwd": kernels.ndstate_fwd, "bwd": kernels.ndstate_bwd},
}
PACKAGES = tuple(name for name in MODULES if "." not in name)
