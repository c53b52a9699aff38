"""What compiled backends of selective scan have in common: outputs are allocated, and several orders run one after another, adding to each other.

A backend brings two functions, for one scan each:

    scan(dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, sequences, initial_state, scale,
         out, earlier, state, checkpoints)
        out = scale (y + D u + earlier) silu(z), with y along the walk; fills state and checkpoints where given.
    scan_backward(dtype, dout, dstate, checkpoints, u, …, initial_state, scale, du, du_earlier, ddelta, dB, dC, dz, dz_earlier, dA, dD, dbias, dproj,
                  dinitial)
        the gradients of scan's arguments, written into du … dinitial; du and dz are added to what is earlier.

The caller has checked shapes and resolved the walk: `index` (l,) int64 is the token visited at each step (None: raster), `starts` the
steps at which the state begins anew (None: only step 0), `reverse` turns the walk round, `sequences` are those of packed tokens (None: one).
Nothing here records gradients.
"""

from __future__ import annotations

import torch

from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import new_state
from medssm.kernels.selective_scan.plan import chunks


class Scans:
    """The four functions of a backend, from its two."""

    def __init__(self, scan, scan_backward):
        self._scan, self._scan_backward = scan, scan_backward

    def forward(
        self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, initial_state, save, final, sequences=None
    ):
        """u, delta, z (b,l,d), or delta (b,l,r) with delta_proj (d,r); A (d,n); B, C (b,l,g,n); D, delta_bias (d,); initial_state (b,d,n).

        save: keep what backward needs. final: return the state after the last step. Returns out (b,l,d), the state (b,d,n) or None, and
        the checkpoints (b,chunks,n,d) or None; out in u's dtype, the others in the compute dtype.
        """
        dtype = compute_dtype(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
        batch, length, channels = u.shape
        n = A.shape[1]
        out = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
        state = new_state(u, A.shape, dtype, initial_state, sequences) if final else None
        checkpoints = torch.empty((batch, chunks(length, n), n, channels), dtype=dtype, device=u.device) if save else None
        if out.numel():
            self._scan(
                dtype,
                u,
                delta,
                A,
                B,
                C,
                D,
                z,
                delta_bias,
                delta_softplus,
                delta_proj,
                index,
                starts,
                reverse,
                sequences,
                initial_state,
                1.0,
                out,
                None,
                state,
                checkpoints,
            )
        return out, state, checkpoints

    def forward_nd(self, x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge, save):
        """One scan per walk (index, starts, reverse), merged in the order of the list.

        x (b,l,d) or (b,l,k,d); delta (b,l,k,d) or (b,l,k,r); A (k,d,n); B, C (b,l,k,g,n); D, delta_bias (k,d); delta_proj (k,d,r); z (b,l,d).
        Returns out (b,l,d), or (b,l,k,d) for merge="stack", in x's dtype, and the checkpoints (b,k,chunks,n,d) or None.
        """
        dtype = compute_dtype(x, delta, A, B, C, D, z, delta_bias, delta_proj)
        k, channels, n = A.shape
        batch, length = x.shape[:2]
        stack = merge == "stack"
        out = torch.empty((batch, length, k, channels) if stack else (batch, length, channels), dtype=x.dtype, device=x.device)
        checkpoints = torch.empty((batch, k, chunks(length, n), n, channels), dtype=dtype, device=x.device) if save else None
        if not out.numel():
            return out, checkpoints
        # The sum of all orders but the last; the last one adds it, scales, gates and writes out.
        total = None if stack or k == 1 else out if out.dtype is dtype else torch.empty_like(out, dtype=dtype)
        for i, (index, starts, reverse) in enumerate(walks):
            last = stack or i == k - 1
            self._scan(
                dtype,
                _slice(x, i),
                delta[:, :, i],
                A[i],
                B[:, :, i],
                C[:, :, i],
                _row(D, i),
                z if last else None,
                _row(delta_bias, i),
                delta_softplus,
                _row(delta_proj, i),
                index,
                starts,
                reverse,
                None,
                None,
                1 / k if last and merge == "mean" else 1.0,
                out[:, :, i] if stack else out if last else total,
                None if stack or i == 0 else total,
                None,
                _column(checkpoints, i),
            )
        return out, checkpoints

    def backward(
        self,
        dout,
        dstate,
        checkpoints,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        delta_proj,
        index,
        starts,
        reverse,
        initial_state,
        sequences=None,
    ):
        """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_proj and initial_state, None where the input is; each in its input's dtype.

        dout (b,l,d); dstate (b,d,n) or None; checkpoints as forward saved them; the rest as in forward.
        """
        inputs = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
        dtype = compute_dtype(*inputs)
        dinitial = None if initial_state is None else new_state(u, A.shape, dtype, dstate, sequences)
        if not u.numel():
            gradients = (None if t is None else torch.zeros_like(t) for t in inputs[:-1])
            return *gradients, None if dinitial is None else dinitial.to(initial_state.dtype)
        du, ddelta, dB, dC, dz = (None if t is None else _new(t) for t in (u, delta, B, C, z))
        weights = (A, D, delta_bias, delta_proj, initial_state)
        dweights = [*(None if t is None else torch.empty(t.shape, dtype=dtype, device=t.device) for t in weights[:-1]), dinitial]
        self._scan_backward(
            dtype,
            dout,
            dstate,
            checkpoints,
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            delta_proj,
            index,
            starts,
            reverse,
            sequences,
            initial_state,
            1.0,
            du,
            None,
            ddelta,
            dB,
            dC,
            dz,
            None,
            *dweights,
        )
        dA, dD, dbias, dproj, dinitial = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
        return du, ddelta, dA, dB, dC, dD, dz, dbias, dproj, dinitial

    def backward_nd(self, dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge):
        """Gradients of x, delta, A, B, C, D, z, delta_bias and delta_proj, None where the input is; each in its input's dtype.

        dout as forward_nd's out; the rest as there. The orders add to the gradients of x and z in the compute dtype.
        """
        inputs = (x, delta, A, B, C, D, z, delta_bias, delta_proj)
        dtype = compute_dtype(*inputs)
        if not x.numel():
            return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
        k = A.shape[0]
        dx, ddelta, dB, dC, dz = (None if t is None else _new(t) for t in (x, delta, B, C, z))
        weights = (A, D, delta_bias, delta_proj)
        dweights = [None if t is None else torch.empty(t.shape, dtype=dtype, device=t.device) for t in weights]
        # Sums over all orders but the last.
        x_total = None if x.dim() == 4 or k == 1 else dx if dx.dtype is dtype else torch.empty_like(dx, dtype=dtype)
        z_total = None if z is None or k == 1 else dz if dz.dtype is dtype else torch.empty_like(dz, dtype=dtype)
        for i, (index, starts, reverse) in enumerate(walks):
            last = i == k - 1
            self._scan_backward(
                dtype,
                _slice(dout, i),
                None,
                checkpoints[:, i],
                _slice(x, i),
                delta[:, :, i],
                A[i],
                B[:, :, i],
                C[:, :, i],
                _row(D, i),
                z,
                _row(delta_bias, i),
                delta_softplus,
                _row(delta_proj, i),
                index,
                starts,
                reverse,
                None,
                None,
                1 / k if merge == "mean" else 1.0,
                _slice(dx if last or x.dim() == 4 else x_total, i),
                None if i == 0 else x_total,
                ddelta[:, :, i],
                dB[:, :, i],
                dC[:, :, i],
                dz if last else z_total,
                None if i == 0 else z_total,
                *(_row(g, i) for g in dweights),
                None,
            )
        dA, dD, dbias, dproj = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
        return dx, ddelta, dA, dB, dC, dD, dz, dbias, dproj


def _new(t):
    """A gradient for t: contiguous, whatever t's strides are."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _slice(x, i):
    """Order i's tokens: a tensor (b,l,k,d) has its own for every order, (b,l,d) serves all."""
    return x[:, :, i] if x.dim() == 4 else x


def _row(weight, i):
    return None if weight is None else weight[i]


def _column(checkpoints, i):
    return None if checkpoints is None else checkpoints[:, i]
