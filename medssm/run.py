"""Run a script or module that imports mamba_ssm or causal_conv1d, with medssm standing in for them.

    python -m medssm.run [--force] script.py [arguments]
    python -m medssm.run [--force] -m module [arguments]

With --force the stand-in replaces installed packages too. `with torch.cuda.device(x.device)` changes nothing for an x on the CPU, where torch
refuses it. See medssm.integrations.mamba_ssm.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch

from medssm.integrations import mamba_ssm


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns 0, or 2 where it cannot be understood. What the script raises passes through, SystemExit too."""
    rest = list(sys.argv[1:] if argv is None else argv)
    force = rest[:1] == ["--force"]
    rest = rest[force:]
    module = rest[:1] == ["-m"]
    if not rest[module:] or rest[module] in ("-h", "--help"):
        print((__doc__ or "").strip(), file=sys.stdout if rest[module:] else sys.stderr)
        return 0 if rest[module:] else 2
    target, *arguments = rest[module:]
    if target.startswith("-"):
        print(f"medssm.run: expected --force, -m or a script, got {target}", file=sys.stderr)
        return 2
    if not module and not os.path.exists(target):
        print(f"medssm.run: no such file: {target}", file=sys.stderr)
        return 2
    sys.argv = [target, *arguments]
    if not module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(target))  # as `python script.py` has it; a package there wins over an installed one
    mamba_ssm.install(force)
    _let_cuda_device_take_the_cpu()
    if module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")
    return 0


def _let_cuda_device_take_the_cpu() -> None:
    """Code written for a GPU says `with torch.cuda.device(x.device)`, or `x.device.index`, around what serves a CPU too: for that, -1, a no-op."""
    init = torch.cuda.device.__init__

    def __init__(self: torch.cuda.device, device: Any) -> None:
        on_cpu = device is None or (isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu")
        init(self, -1 if on_cpu else device)

    torch.cuda.device.__init__ = __init__  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
