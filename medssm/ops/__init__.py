"""The public functions: one file per op, the same contract on every backend."""

from torch import fx as _fx

from medssm.ops.bi_wkv import bi_wkv as bi_wkv
from medssm.ops.causal_conv1d import causal_conv1d as causal_conv1d
from medssm.ops.causal_conv1d import causal_conv1d_step as causal_conv1d_step
from medssm.ops.delta_rule import delta_rule as delta_rule
from medssm.ops.delta_rule import delta_rule_step as delta_rule_step
from medssm.ops.depthwise_conv import depthwise_conv as depthwise_conv
from medssm.ops.gated_linear_attention import gated_linear_attention as gated_linear_attention
from medssm.ops.gated_linear_attention import gated_linear_attention_step as gated_linear_attention_step
from medssm.ops.linear_attention import linear_attention as linear_attention
from medssm.ops.linear_attention import linear_attention_step as linear_attention_step
from medssm.ops.selective_scan import selective_scan as selective_scan
from medssm.ops.selective_scan import selective_scan_step as selective_scan_step
from medssm.ops.selective_scan_nd import selective_scan_nd as selective_scan_nd
from medssm.ops.ssd import ssd as ssd
from medssm.ops.ssd import ssd_step as ssd_step
from medssm.ops.ssd3 import ssd3 as ssd3
from medssm.ops.ssd3 import ssd3_step as ssd3_step

# torch.fx traces a call of medssm.ops.<op> as one node. It finds functions by the module that a call names them in.
for _name in [name for name, value in globals().items() if callable(value) and not name.startswith("_")]:
    _fx.wrap(_name)
