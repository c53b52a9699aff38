"""medssm nnunet: plans with one of medssm's networks, and the folder of trainers for nnU-Net."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from medssm.errors import UserError
from medssm.integrations.nnunet.plans import rewrite

TRAINERS = Path(__file__).with_name("trainers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "nnU-Net finds the trainers of `medssm nnunet path` with: export nnUNet_extTrainer=$(medssm nnunet path)"
    parser.add_argument(
        "action",
        choices=("plans", "path"),
        help="plans: write nnU-Net's plans anew with a network of medssm's; path: the folder that serves trainers to nnU-Net",
    )
    parser.add_argument("plans", nargs="?", metavar="PLANS.json", help="nnU-Net's plans, as nnUNetv2_plan_and_preprocess wrote them")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the model, values in JSON, for instance features=[16,32,64]")
    parser.add_argument("--model", help="one of `medssm models`")
    parser.add_argument("--out", help="the new plans (default NAME.json beside PLANS.json: nnU-Net looks for NAME.json there)")
    parser.add_argument(
        "--configuration",
        action="append",
        default=[],
        metavar="NAME",
        help="3d_fullres, 2d, ...; may be repeated (default: all that have a network of their own)",
    )
    parser.add_argument("--name", help="the new plans' identifier, for nnU-Net's -p (default that of --out, else the old one and the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace plans that exist")
    parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]  # key=value may follow the flags


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.action == "path":
        if args.plans:
            raise UserError(f"path: expected no further argument, got {args.plans!r}")
        names = [name for file in sorted(TRAINERS.glob("*.py")) for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)]
        if not args.json:
            print(TRAINERS)
        return {"path": str(TRAINERS), "trainers": names}
    for flag, value in (("PLANS.json", args.plans), ("--model", args.model)):
        if not value:
            raise UserError(f"{flag}: expected a value, got none")
    result = rewrite(
        args.plans,
        args.model,
        args.out,
        configurations=args.configuration,
        name=args.name,
        options=dict(map(_option, args.options)),
        overwrite=args.overwrite,
    )
    if not (args.json or args.quiet):
        _print(result)
    return result


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"options: expected key=value, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _print(result: dict[str, Any]) -> None:
    print(f"{result['plans']}: {result['model']}")
    for name, told in result["configurations"].items():
        outputs = ", ".join("x".join(map(str, output)) for output in told["outputs"])
        supervised = f"deep supervision at steps of {outputs} voxels" if len(told["outputs"]) > 1 else "no deep supervision"
        print(f"  {name}: {told['parameters'] / 1e6:.1f} M parameters, patches of {'x'.join(map(str, told['patch_size']))}, {supervised}")
    print(f"nnUNetv2_train {result['dataset']} {next(iter(result['configurations']))} 0 -p {result['name']}")
