"""medssm nnunet: plans with one of medssm's networks, and the folder of trainers for nnU-Net."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from medssm.errors import UserError
from medssm.integrations.nnunet.plans import rewrite
from medssm.options import Option

TRAINERS = Path(__file__).with_name("trainers")


def plans(
    plans: Path | str,
    *options: str,
    model: str,
    out: Path | str | None = None,
    configurations: Annotated[Sequence[str], Option(flag="--configuration", repeat=True)] = (),
    name: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write nnU-Net's plans anew with a network of medssm's.

    Args: Options
        plans: nnU-Net's plans, as nnUNetv2_plan_and_preprocess wrote them
        options: of the model as key=value, values in JSON, for instance features=[16,32,64]
        model: one of `medssm models`
        out: the new plans (default: NAME.json beside the old ones, where nnU-Net looks for it)
        configurations: 3d_fullres, 2d, ...; may be repeated (default: all that have a network of their own)
        name: the new plans' identifier, for nnU-Net's -p (default: that of `out`, else the old one and the model)
        overwrite: replace plans that exist
    """
    return rewrite(plans, model, out, configurations=list(configurations), name=name, options=dict(map(_option, options)), overwrite=overwrite)


def show_plans(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the new configurations and nnU-Net's command that trains the first."""
    print(f"{result['plans']}: {result['model']}")
    for name, told in result["configurations"].items():
        outputs = ", ".join("x".join(map(str, output)) for output in told["outputs"])
        supervised = f"deep supervision at steps of {outputs} voxels" if len(told["outputs"]) > 1 else "no deep supervision"
        print(f"  {name}: {told['parameters'] / 1e6:.1f} M parameters, patches of {'x'.join(map(str, told['patch_size']))}, {supervised}")
    print(f"nnUNetv2_train {result['dataset']} {next(iter(result['configurations']))} 0 -p {result['name']}")


def path() -> dict[str, Any]:
    """The folder of trainers for nnU-Net, which finds them with: export nnUNet_extTrainer=$(medssm nnunet path)"""
    names = [name for file in sorted(TRAINERS.glob("*.py")) for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)]
    return {"path": str(TRAINERS), "trainers": names}


def show_path(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the folder."""
    print(result["path"])


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"options: expected key=value, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
