"""mamba_ssm's Mamba with the arguments of its forks (Vim, SegMamba), Block and create_block."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn
from torch.nn import functional as F

from medssm import nn as layers
from medssm import ops
from medssm.integrations.mamba_ssm import convolution, norm, scan

_KINDS = {"none": layers.Mamba, "v1": layers.Mamba, "v2": layers.BiMamba, "v3": layers.TriMamba}


class Mamba(layers.Mamba):
    """mamba_ssm.Mamba, and Vim's and SegMamba's: medssm's Mamba, BiMamba ("v2") or TriMamba ("v3") under upstream's arguments and attributes.

    Args:
        d_model to bias: as medssm.nn.Mamba. device, dtype: of the weights; A_log and D stay in float32.
        bimamba_type: "none"; "v1", a reversed scan with its own A_b (Vim); "v2", two directions (Vim); "v3", three (SegMamba).
        nslices: of "v3", into how many slices the sequence falls. if_divide_out: of "v2", halve the sum. init_layer_scale: start of `gamma`, which
            scales the output (Vim). use_fast_path: of no effect. layer_idx: key of the state that inference_params keeps.

    Input and output (b, l, d_model). Weights as upstream. Each direction's step projection starts like the first one's.
    """

    # Also for a whole model that upstream's code pickled: it carries no more than its own version's attributes.
    bimamba_type, nslices, if_divide_out, init_layer_scale = "none", 5, False, None

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1, dt_init="random", dt_scale=1.0,
                 dt_init_floor=1e-4, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, device=None, dtype=None,
                 bimamba_type="none", nslices=5, if_divide_out=False, init_layer_scale=None):
        if bimamba_type not in _KINDS:
            raise ValueError(f"bimamba_type: expected {', '.join(map(repr, _KINDS))}, got {bimamba_type!r}")
        self.bimamba_type = bimamba_type  # before the weights, which are one set per direction
        with contextlib.nullcontext() if device is None else torch.device(device):
            super().__init__(d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias)
            if bimamba_type == "v1":
                self.A_b_log = nn.Parameter(self.A_log.detach().clone())
            gamma = None if init_layer_scale is None else nn.Parameter(init_layer_scale * torch.ones(d_model))
        for parameter in self.parameters(recurse=False):  # A_log and D of every direction
            parameter._no_weight_decay = True
        if gamma is not None:
            self.gamma = gamma
        for suffix in self.suffixes:
            getattr(self, f"dt_proj{suffix}").bias._no_reinit = True
        for projection in self.children():
            projection.to(dtype)
        self.d_conv, self.expand, self.d_inner = d_conv, expand, int(expand * d_model)
        self.use_fast_path, self.layer_idx, self.activation, self.act = use_fast_path, layer_idx, "silu", nn.SiLU()
        self.nslices, self.if_divide_out, self.init_layer_scale = nslices, if_divide_out, init_layer_scale

    @property
    def suffixes(self):
        return _KINDS[self.bimamba_type].suffixes

    @property
    def slices(self):
        return self.nslices

    @property
    def divide_out(self):
        return self.if_divide_out

    def orders(self, x):
        return _KINDS[self.bimamba_type].orders(self, x)

    def merge(self, y):
        return _KINDS[self.bimamba_type].merge(self, y)

    def forward(self, hidden_states, inference_params=None):
        """(b, l, d_model) -> the same. inference_params, with key_value_memory_dict and seqlen_offset, keeps the state from call to call."""
        if inference_params is not None:
            out = self._continue(hidden_states, inference_params)
        elif self.bimamba_type == "v1":
            A, A_b = (-torch.exp(t.float()) for t in (self.A_log, self.A_b_log))
            out = scan.bimamba_inner_fn(self.in_proj(hidden_states).movedim(-1, 1), self.conv1d.weight, self.conv1d.bias, self.x_proj.weight,
                                        self.dt_proj.weight, self.out_proj.weight, self.out_proj.bias, A, A_b, D=self.D,
                                        delta_bias=self.dt_proj.bias)
        else:
            out = super().forward(hidden_states)
        return out if self.init_layer_scale is None else out * self.gamma

    def step(self, hidden_states, conv_state, ssm_state):
        """One token, (b, 1, d_model) -> (out, conv_state (b, inner, d_conv), ssm_state (b, inner, d_state)), both updated in place."""
        self._one_way()
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected (b, 1, {self.d_model}), one token, got {tuple(hidden_states.shape)}")
        u, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        u = convolution.causal_conv1d_update(u, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = scan.selective_state_update(ssm_state, u, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), B, C, self.D, z,
                                        self.dt_proj.bias, True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """(conv_state, ssm_state) of `step`, zeros: before the first token."""
        self._one_way()
        return tuple(weight.new_zeros((batch_size, self.d_inner, n), dtype=dtype)
                     for weight, n in ((self.conv1d.weight, self.d_conv), (self.dt_proj.weight, self.d_state)))

    def _continue(self, x, inference_params):
        """The sequence's first part, or one more token, with the state that inference_params keeps for this layer."""
        self._one_way()
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(len(x), None)
        conv_state, ssm_state = cache[self.layer_idx]
        if inference_params.seqlen_offset > 0:
            return self.step(x, conv_state, ssm_state)[0]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv_state.copy_(F.pad(u.detach().movedim(-1, 1), (self.d_conv - u.shape[1], 0)))
        u = ops.causal_conv1d(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, state = ops.selective_scan(u, dt, -torch.exp(self.A_log.float()), B, C, self.D, z, self.dt_proj.bias, True,
                                      delta_proj=self.dt_proj.weight, return_final_state=True)
        ssm_state.copy_(state.detach())
        return self.out_proj(y)

    def _one_way(self):
        if self.bimamba_type != "none":
            raise ValueError(f"bimamba_type: expected 'none', since only a forward scan runs token by token, got {self.bimamba_type!r}")


class Block(nn.Module):
    """mamba_ssm's residual block: (x, residual) -> (mixer(norm(x + residual)), x + residual), and likewise an mlp behind it.

    Args:
        dim: channels. mixer_cls, mlp_cls, norm_cls: made with dim; an mlp_cls of nn.Identity leaves the mlp out.
        fused_add_norm: round the sum only once, by layer_norm_fn. residual_in_fp32: keep the sum in float32.
    """

    def __init__(self, dim, mixer_cls, mlp_cls=nn.Identity, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        x, residual = self._add_norm(self.norm, hidden_states, residual)
        x = self.mixer(x, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            x, residual = self._add_norm(self.norm2, x, residual)
            x = self.mlp(x)
        return x, residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, layer, x, residual):
        if self.fused_add_norm:
            return norm.layer_norm_fn(x, layer.weight, layer.bias, residual, eps=layer.eps, prenorm=True, residual_in_fp32=self.residual_in_fp32,
                                      is_rms_norm=isinstance(layer, norm.RMSNorm))
        residual = x if residual is None else x + residual
        x = layer(residual.to(layer.weight.dtype))
        return x, residual.float() if self.residual_in_fp32 else residual


def create_block(d_model, d_intermediate=0, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5, rms_norm=False,
                 residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None):
    """A Block of Mamba with a layer or RMS norm. ssm_cfg: Mamba's arguments (mamba_ssm 1 has it in d_intermediate's place, as a call here may).

    Raises NotImplementedError for Mamba2, attention and the gated MLP (d_intermediate > 0).
    """
    if isinstance(d_intermediate, dict):
        d_intermediate, ssm_cfg = 0, d_intermediate
    config = dict(ssm_cfg or {})
    kind = config.pop("layer", "Mamba1")
    for name, given, expected in (("ssm_cfg['layer']", kind, "Mamba1"), ("d_intermediate", d_intermediate, 0),
                                  ("attn_layer_idx", layer_idx in (attn_layer_idx or ()), False)):
        if given != expected:
            raise NotImplementedError(f"{name}: expected {expected!r} (more is not in this release of medssm), got {given!r}")
    mixer = functools.partial(Mamba, layer_idx=layer_idx, device=device, dtype=dtype, **config)
    normed = functools.partial(norm.RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, device=device, dtype=dtype)
    block = Block(d_model, mixer, norm_cls=normed, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)
    block.layer_idx = layer_idx
    return block
