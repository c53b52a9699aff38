"""What nnU-Net's plans say of a network, of both generations: that with `architecture` in each configuration, and that before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from medssm.errors import UserError
from medssm.models.facts import Plan
from medssm.models.registry import create_model, model_facts, model_options
from medssm.nn import UNet

OURS = "medssm.integrations.nnunet.Network"  # the network's class in plans that medssm wrote


def inherited(configurations: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    entry, seen = dict(configurations[name]), [name]
    while "inherits_from" in entry:
        parent = entry.pop("inherits_from")
        if parent not in configurations or parent in seen:
            raise UserError(f"configuration: {name}: expected to inherit from another one of {', '.join(configurations)}, got {parent!r}")
        seen.append(parent)
        entry = {**configurations[parent], **entry}
    return entry


def read_plan(where: str, entry: Mapping[str, Any]) -> Plan:
    """The U-Net of a configuration, of either generation."""
    try:
        if "architecture" in entry:
            own = entry["architecture"]
            if own["network_class_name"] == OURS:
                raise UserError(f"{where}: expected nnU-Net's own network, got {OURS}: start from the plans that nnU-Net wrote")
            unet = own["arch_kwargs"]
            features, strides, kernels = unet["features_per_stage"], unet["strides"], unet["kernel_sizes"]
            blocks = unet["n_blocks_per_stage"] if "n_blocks_per_stage" in unet else unet["n_conv_per_stage"]
            decoder_blocks = unet["n_conv_per_stage_decoder"]
        else:
            strides, kernels = entry["pool_op_kernel_sizes"], entry["conv_kernel_sizes"]
            blocks, decoder_blocks = entry["n_conv_per_stage_encoder"], entry["n_conv_per_stage_decoder"]
            features = [min(entry["UNet_base_num_features"] * 2**s, entry["unet_max_num_features"]) for s in range(len(strides))]
        plan = Plan(list(entry["patch_size"]), int(entry["batch_size"]), *map(list, (features, strides, kernels, blocks, decoder_blocks)))
        dims, stages = len(plan.patch), len(plan.features)
        fits = dims in (2, 3) and all(len(step) == dims for step in (*plan.strides, *plan.kernels))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: expected the lists of nnU-Net's U-Net and a patch size, got none or a wrong one ({error!r})") from error
    if not fits or [len(plan.strides), len(plan.kernels), len(plan.blocks), len(plan.decoder_blocks)] != [stages, stages, stages, stages - 1]:
        raise UserError(
            f"{where}: expected one entry of each list per stage and per axis, got {stages} features, {plan.strides} as strides and "
            f"{plan.kernels} as kernels, {plan.blocks} and {plan.decoder_blocks} blocks for the patch {plan.patch}"
        )
    return plan


def options_from_plan(model: str, plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a model takes from the plans, as its facts say.

    `features` and `size`, given among the options, settle the number of stages; strides and kernels are then the plans' first ones.
    """
    from_plan, stages = model_facts(model).from_plan, len(plan.features)
    if from_plan is None:
        return {}
    known = model_options(model)
    if "features" in known and "features" in options:
        if not isinstance(options["features"], Sequence) or isinstance(options["features"], str):
            raise ValueError(f"features: expected a list with one entry per stage, got {options['features']!r}")
        stages = len(options["features"])
    elif "size" in known and "size" in options:
        stages = len(cast(UNet, create_model(model, len(plan.patch), **options)).encoder.strides)
    if stages > len(plan.features) and "strides" not in options:
        raise ValueError(f"strides: expected {stages} entries, one per stage of the network, got the {len(plan.features)} of the plans")
    return from_plan(plan.first(stages), options)
