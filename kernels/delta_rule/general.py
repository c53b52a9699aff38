"""What the backends share of the delta rule's general form: which calls need it, and the gradients of what a call leaves out."""

from __future__ import annotations

import torch


def is_general(g, erase, erase_out, write, erase_first):
    """Whether a call is more than a = beta k, c = k, w = beta with one decay per head."""
    return erase_first or not (erase is None and erase_out is None and write is None and (g is None or g.dim() == 3))


def defaults_back(k, beta, erase, write, dk, derase, dwrite):
    """The gradients of k, beta, erase and write, from those of k as the key that is written, of a and of w, which are beta k and beta by default.

    All in the compute dtype; those of erase and write are None where the call has none.
    """
    dbeta = torch.zeros(beta.shape, dtype=dk.dtype, device=dk.device)
    if write is None:
        dbeta, dwrite = dwrite, None
    if erase is None:
        dbeta = dbeta + (derase * k).sum(-1)
        dk = torch.addcmul(dk, derase, beta[..., None].to(dk.dtype))
        derase = None
    return dk, dbeta, derase, dwrite
