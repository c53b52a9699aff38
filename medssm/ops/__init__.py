"""The public functions: one file per op, the same contract on every backend."""

from medssm.ops.bi_wkv import bi_wkv
from medssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from medssm.ops.delta_rule import delta_rule, delta_rule_step
from medssm.ops.depthwise_conv import depthwise_conv
from medssm.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from medssm.ops.linear_attention import linear_attention, linear_attention_step
from medssm.ops.selective_scan import selective_scan, selective_scan_step
from medssm.ops.selective_scan_nd import selective_scan_nd
from medssm.ops.ssd import ssd, ssd_step

__all__ = [
    "bi_wkv",
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_rule",
    "delta_rule_step",
    "depthwise_conv",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "linear_attention",
    "linear_attention_step",
    "selective_scan",
    "selective_scan_nd",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
