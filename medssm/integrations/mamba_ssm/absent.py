"""Names and arguments that upstream has and this release has not."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


class _Absent(type):
    """Imports and is inherited from like a class; calling it (or an heir), indexing it and taking an attribute raises one clear line."""

    def __call__(cls, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(cls._line())

    def __getitem__(cls, _grid: object) -> NoReturn:  # a Triton kernel's launch
        raise NotImplementedError(cls._line())

    def __getattr__(cls, attribute: str) -> NoReturn:
        raise AttributeError(cls._line())

    def _line(cls) -> str:
        named = next(base.__name__ for base in cls.__mro__ if "_is_absent" in vars(base))
        return f"{named} is not in this release of medssm, which stands in for mamba_ssm and causal_conv1d here"


def absent(names: str) -> dict[str, type]:
    """A placeholder for each of the names, which spaces separate."""
    return {name: _Absent(name, (), {"_is_absent": True}) for name in names.split()}


def refuse(**arguments: object) -> None:
    """Raise NotImplementedError for the first of these arguments that is given, neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name}: expected {'False' if value is True else 'None'} (it is not in this release of medssm), got {got}")


# By upstream's module: layers that need a process group, attention, CUDA graphs, and the Triton kernels with the functions that launch them.
NAMES: dict[str, str] = {
    "mamba_ssm.distributed.distributed_utils": """all_gather_raw reduce_scatter_raw all_reduce_raw AllGatherFunc all_gather ReduceScatterFunc
        reduce_scatter AllReduceFunc all_reduce sync_shared_params allreduce_sequence_parallel_grad get_dim_for_local_rank""",
    "mamba_ssm.distributed.tensor_parallel": """ParallelLinearFunc parallel_linear_func ColumnParallelLinear RowParallelLinear
        VocabParallelEmbedding ColumnParallelEmbedding ParallelEmbeddings""",
    "mamba_ssm.modules.mha": "_update_kv_cache MHA",
    "mamba_ssm.modules.ssd_minimal": "test_correctness",
    "mamba_ssm.ops.cute": "",
    "mamba_ssm.ops.cute.mamba3": "",
    "mamba_ssm.ops.cute.mamba3.mamba3_step_fn": """transpose_view select get_gmem_tiled_copy Mamba3Step mamba3_step_fn
        selective_state_update_fused_ref_v2 _bytes_of""",
    "mamba_ssm.ops.tilelang": "",
    "mamba_ssm.ops.tilelang.mamba3": "",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo": "_Mamba3Function",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo_bwd": "mamba_mimo_bwd_fwd mamba_mimo_bwd_bwd mamba_mimo_bwd_combined",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo_bwd_varlen": "mamba_mimo_bwd_fwd mamba_mimo_bwd_bwd mamba_mimo_bwd_combined_varlen",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo_fwd": "mamba_mimo_fwd mamba_mimo_forward",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo_fwd_varlen": "mamba_mimo_fwd mamba_mimo_forward_varlen",
    "mamba_ssm.ops.triton.k_activations": "_swiglu_fwd_kernel _swiglu_fwd _swiglu_bwd_kernel _swiglu_bwd",
    "mamba_ssm.ops.triton.layer_norm": "config_prune _layer_norm_fwd_1pass_kernel _layer_norm_fwd _layer_norm_bwd_kernel _layer_norm_bwd",
    "mamba_ssm.ops.triton.layernorm_gated": "_layer_norm_fwd_1pass_kernel _layer_norm_fwd _layer_norm_bwd_kernel _layer_norm_bwd",
    "mamba_ssm.ops.triton.mamba3": "",
    "mamba_ssm.ops.triton.mamba3.angle_dt": "angle_dt_fwd_kernel angle_dt_fwd angle_dt_bwd_kernel angle_dt_bwd",
    "mamba_ssm.ops.triton.mamba3.grouped_head_reduction": """reduce_grouped_qk_grads _reduce_grouped_qk_grads_and_bias_partial_kernel
        _finalize_qk_bias_kernel _next_power_of_2 reduce_grouped_qk_grads_and_bias_triton""",
    "mamba_ssm.ops.triton.mamba3.mamba3_mimo_rotary_step": """rotary_qk_inference_kernel apply_rotary_qk_inference_fwd
        apply_rotary_qk_inference_reference test_correctness_qk_inference""",
    "mamba_ssm.ops.triton.mamba3.mamba3_mimo_utils": """bwd_dadt_cumsum_fused_kernel bwd_segsum_dadt_kernel bwd_dtrap_ddt_kernel
        dacs_segsum_kernel_varlen dacs_segsum_kernel bwd_dadt_fused_triton bwd_dtrap_ddt_triton compute_dacs_segsum_triton_varlen
        compute_dacs_segsum_triton bwd_segsum_ddt_from_dSSdA_ref bwd_ddt_from_ddA_cs_rev_ref bwd_ddt_from_ddA_cs_ref compute_dtrap_ddt_ref
        compute_dacs_segsum_ref compute_dacs_segsum_ref_varlen bwd_dadt_fused_varlen_ref compute_dtrap_ddt_varlen_ref
        bwd_dadt_cumsum_fused_kernel_varlen bwd_segsum_dadt_kernel_varlen bwd_dtrap_ddt_kernel_varlen _build_varlen_chunk_mapping
        bwd_dadt_fused_triton_varlen bwd_dtrap_ddt_triton_varlen test_bwd_ddt_fused_correctness test_dtrap_ddt_correctness
        test_dacs_segsum_correctness_varlen test_dacs_segsum_correctness test_bwd_dadt_fused_varlen_correctness
        test_dtrap_ddt_varlen_correctness benchmark_bwd_ddt benchmark_dacs_segsum benchmark_dtrap_ddt""",
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_bwd": """mamba3_siso_bwd_kernel_dzdo compute_dzdo mamba3_siso_bwd_kernel_dqkv compute_dqkv
        mamba3_siso_bwd_kernel_rotary_bias_angles mamba3_siso_bwd_kernel_dk_state_post compute_dqktheta apply_dk_state_post
        mamba3_siso_bwd_kernel_ddt_dtrap_dinput_states compute_ddt_dtrap_dinput_states _alloc_fn""",
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined": "_triton_alloc_fn Mamba3Output _Mamba3Function",
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_fwd": "_prune_mamba3_siso_fwd_configs mamba3_siso_fwd_kernel _alloc_fn mamba3_siso_fwd",
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_step": "mamba3_siso_step_kernel _alloc_fn",
    "mamba_ssm.ops.triton.mamba3.utils": "cos_approx sin_approx tanh_approx sech2_approx sigmoid_approx silu",
    "mamba_ssm.ops.triton.selective_state_update": "_selective_scan_update_kernel",
    "mamba_ssm.ops.triton.ssd_bmm": "init_to_zero _bmm_chunk_fwd_kernel _bmm_chunk_bwd_kernel _bmm_chunk_bwd",
    "mamba_ssm.ops.triton.ssd_chunk_scan": """init_to_zero _chunk_scan_fwd_kernel _chunk_scan_fwd_kernel_wip _chunk_scan_bwd_dz_kernel
        _chunk_scan_bwd_dstates_kernel _chunk_scan_bwd_dc_kernel _chunk_scan_bwd_dx_kernel _chunk_scan_bwd_dcb_kernel
        _chunk_scan_bwd_ddAcs_unstable_kernel _chunk_scan_bwd_ddAcs_stable_kernel_old _chunk_scan_bwd_ddAcs_stable_kernel
        _chunk_scan_bwd_ddAcs_prev_kernel _chunk_scan_fwd_wip _chunk_scan_bwd_dz _chunk_scan_bwd_dstates _chunk_scan_bwd_dC _chunk_scan_bwd_dcb
        _chunk_scan_bwd_dx _chunk_scan_bwd_ddAcs_unstable _chunk_scan_bwd_ddAcs_stable_old _chunk_scan_bwd_ddAcs_stable
        _chunk_scan_bwd_ddAcs_prev""",
    "mamba_ssm.ops.triton.ssd_chunk_state": """init_to_zero _chunk_cumsum_fwd_kernel _chunk_cumsum_bwd_kernel _chunk_state_fwd_kernel
        _chunk_state_bwd_dx_kernel _chunk_state_bwd_db_kernel _chunk_state_bwd_ddAcs_stable_kernel _chunk_state_varlen_kernel _chunk_cumsum_bwd
        _chunk_state_bwd_dx _chunk_state_bwd_db _chunk_state_bwd_ddAcs_stable""",
    "mamba_ssm.ops.triton.ssd_combined": """init_to_zero _chunk_scan_chunk_state_bwd_dx_kernel _chunk_scan_chunk_state_bwd_dx
        _mamba_chunk_scan_combined_fwd _mamba_chunk_scan_combined_bwd selective_scan_bwd""",
    "mamba_ssm.ops.triton.ssd_state_passing": "_state_passing_fwd_kernel _state_passing_bwd_kernel _state_passing_bwd",
    "mamba_ssm.utils.determinism": "_filter_configs_by_block_sizes",
    "mamba_ssm.utils.generation": "DecodingCGCache update_graph_cache capture_graph",
    "causal_conv1d.causal_conv1d_varlen": "_causal_conv1d_varlen_states",
    "causal_conv1d.cpp_functions": "_causal_conv1d_fwd_cpp _causal_conv1d_bwd_cpp _causal_conv1d_update_cpp",
}
