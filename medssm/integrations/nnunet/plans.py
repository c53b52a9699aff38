"""nnU-Net's plans, rewritten so that nnU-Net builds one of medssm's networks. Nothing else of them changes, so preprocessed data serve as they are.

Both generations are read: that with `architecture` in each configuration, and that before it, with UNet_class_name, conv_kernel_sizes,
pool_op_kernel_sizes and their like beside the rest. The first is written.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.integrations.nnunet.networks import Network, output_resolutions, resolutions
from medssm.models import create_model, list_models
from medssm.models.facts import Plan
from medssm.models.plans import OURS, inherited, options_from_plan, read_plan
from medssm.nn import UNet

_OLD_KEYS = (
    "UNet_class_name",
    "UNet_base_num_features",
    "unet_max_num_features",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "num_pool_per_axis",
    "pool_op_kernel_sizes",
    "conv_kernel_sizes",
)
_OURS = ("spatial_dims", "in_channels", "out_channels", "deep_supervision", "pretrained", "features_only")


def rewrite(
    plans: Path | str,
    model: str,
    out: Path | str | None = None,
    *,
    configurations: Sequence[str] = (),
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the plans file `plans` anew, with `model` as the network of its configurations.

    Args:
        model: one of medssm.list_models() that segments. options: more keywords of create_model, which win over what the plans say.
        out: the new file, by default NAME.json beside `plans`, where nnU-Net looks for it. name: the plans' identifier, for nnU-Net's -p;
            by default that of `out`, else the old one and the model.
        configurations: those to rewrite, by default all that have a network of their own.
        overwrite: replace `out` if it exists.

    Each network is run on its configuration's patch without computing anything, so that what nnU-Net's loss would refuse is refused here.
    Raises UserError. Returns {"plans", "name", "dataset", "model", "configurations": {name: {"patch_size", "outputs", "parameters"}}}; outputs: how
    many of the input's voxels one voxel of each supervised output spans, one entry where there is the full resolution alone.
    """
    if model not in list_models():
        raise UserError(f"model: expected one of {', '.join(list_models())}, got {model!r}")
    plans = Path(plans)
    content = read_json(plans)
    known = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(known, dict) or not all(isinstance(own, dict) for own in known.values()) or not isinstance(content.get("plans_name"), str):
        raise UserError(f"{plans}: expected nnU-Net's plans, a JSON object with plans_name and configurations")
    name = name or (Path(out).stem if out else f"{content['plans_name']}_{model}")
    if not re.fullmatch(r"[\w.-]+", name) or "__" in name:
        raise UserError(f"name: expected letters, digits, '.', '-' and single '_' (nnU-Net splits its folders' names at '__'), got {name!r}")
    out = Path(out) if out else plans.with_name(f"{name}.json")
    if out.exists() and (not overwrite or out.resolve() == plans.resolve()):
        raise UserError(f"{out}: expected a new file, got one that exists" + ("" if overwrite else " (--overwrite replaces it)"))
    for option in options or {}:
        if option in _OURS:
            raise UserError(f"{option}: expected an option of the model, got one that nnU-Net sets")
    for configuration in configurations:
        if configuration not in known:
            raise UserError(f"configuration: expected one of {', '.join(known)}, got {configuration!r}")
    result = {"plans": str(out), "name": name, "dataset": content.get("dataset_name"), "model": model, "configurations": {}}
    written = copy.deepcopy(content)
    for configuration in configurations or [key for key, own in known.items() if {"architecture", "UNet_class_name", "patch_size"} & set(own)]:
        plan = read_plan(f"{plans}: {configuration}", inherited(known, configuration))
        try:
            arguments, network = _arguments(model, plan, dict(options or {}))
        except ValueError as error:
            raise UserError(f"{configuration}: {' '.join(str(error).split())}") from error
        except (TypeError, RuntimeError) as error:  # a value of the wrong kind, a layer of an impossible size
            raise UserError(f"{configuration}: {model} does not take the options {options}: {' '.join(str(error).split())}") from error
        spans = sorted(set(resolutions(arguments["strides"])[:-1]))
        result["configurations"][configuration] = {
            "patch_size": plan.patch,
            "outputs": spans,
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        entry = written["configurations"][configuration]
        for key in _OLD_KEYS:
            entry.pop(key, None)
        entry["architecture"] = {"network_class_name": OURS, "arch_kwargs": arguments, "_kw_requires_import": []}
    if not result["configurations"]:
        raise UserError(f"{plans}: expected a configuration with a network of its own, got {', '.join(known) or 'none'}")
    written["plans_name"] = name
    write_json(out, written)
    return result


def _arguments(model: str, plan: Plan, options: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """What the plans tell Network, and the network that it makes of that."""
    dims = len(plan.patch)
    options = options_from_plan(model, plan, options) | options
    arguments: dict[str, Any] = {"model": model, "spatial_dims": dims, "strides": _strides(model, plan.patch, options), "options": options}
    network = Network(1, 2, **arguments, deep_supervision=True)
    _check(network, arguments, plan)
    return arguments, network


def _strides(model: str, patch: Sequence[int], options: Mapping[str, Any]) -> list[list[int]]:
    """From output to output for nnU-Net's loss, and from the last to the coarsest map. Outputs whose voxels do not divide the patch are left out:
    nnU-Net's labels would lie elsewhere. Without a second output all are 1: see Network."""
    try:
        network = create_model(model, len(patch), 1, 2, deep_supervision=True, **options)
    except (TypeError, ValueError):
        network = create_model(model, len(patch), 1, 2, **options)  # the error, if it is about anything else
    outputs = list(itertools.takewhile(lambda output: not any(p % n for p, n in zip(patch, output, strict=True)), output_resolutions(network)))
    if len(outputs) < 2:
        return [[1] * len(patch)] * 3
    levels = [(1,) * len(patch), *outputs, cast(UNet, network).size_divisor]
    return [[b // a for a, b in zip(fine, coarse, strict=True)] for fine, coarse in itertools.pairwise(levels)]


def _check(network: nn.Module, arguments: Mapping[str, Any], plan: Plan) -> None:
    """ValueError where the network refuses the configuration's patch or gives logits that nnU-Net's loss would refuse. Nothing is computed."""
    try:
        with _quiet_fakes(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            given = network(torch.zeros(plan.batch, 1, *plan.patch))
    except Exception as error:  # whatever a network raises
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {arguments['model']} does not take patches of {plan.patch}: {message}") from error
    wanted = [(plan.batch, 2, *(round(p / n) for p, n in zip(plan.patch, output, strict=True))) for output in resolutions(arguments["strides"])[:-1]]
    got = [tuple(logits.shape) for logits in given]
    if got != wanted:
        raise ValueError(
            f"model: expected one that segments, with logits {wanted} for a batch of patches of {plan.patch}, got {got} from {arguments['model']}"
        )


@contextlib.contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Without PyTorch's log of what a fake tensor's operator raises: `_check` says it in one line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
