"""medssm models: the networks that create_model builds, with their size at a stated input."""

from __future__ import annotations

import torch

from medssm.errors import UserError
from medssm.models import create_model, list_models


def add_arguments(parser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of model names, for instance 'umamba*' (default: all)")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3, help="spatial dimensions to count parameters at (default 3)")


def run(args) -> dict:
    """Name and parameter count, for one input and two output channels; nothing is allocated (meta device)."""
    names = list_models(args.pattern)
    if not names:
        raise UserError(f"no model matches {args.pattern!r}; the models are {', '.join(list_models())}")
    rows = []
    for name in names:
        with torch.device("meta"):
            model = create_model(name, spatial_dims=args.dims, in_channels=1, out_channels=2)
        rows.append({"name": name, "spatial_dims": args.dims, "parameters": sum(p.numel() for p in model.parameters())})
    if not (args.json or args.quiet):
        width = max(len(name) for name in names)
        print(f"{'model':<{width}}  parameters ({args.dims}D, 1 input and 2 output channels)")
        for row in rows:
            print(f"{row['name']:<{width}}  {row['parameters']:>12,}")
    return {"models": rows}
