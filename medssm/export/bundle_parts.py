"""What the MONAI bundles of networks that segment and of classifiers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from medssm.segment import networks

# MONAI's NormalizeIntensity leaves zeros where they are; training moved them too.
_ZSCORE = "$lambda x: (x - x[x != 0].double().mean().nan_to_num()) / (x[x != 0].double().std(correction=0).nan_to_num() or 1.0)"
_FITTED = "clipped, less the training cases' mean, over their deviation"
SCALED = {  # in words, what `intensity` makes
    "ct": _FITTED,
    "picture": _FITTED,
    "none": "as it is",
    "zscore": "less the mean, over the deviation of the image's own nonzero voxels",
}


class Contents(NamedTuple):
    """A bundle before it is written.

    network    whose weights it has
    inference  configs/inference.json
    metadata   what configs/metadata.json says of this network alone
    packages   {package: version} that it needs, besides MONAI's runner and the package of the network
    readme     (name of the bundle, all that it needs) -> docs/README.md
    scripts    {path in the bundle: text}
    """

    network: nn.Module
    inference: dict[str, Any]
    metadata: dict[str, Any]
    packages: dict[str, str]
    readme: Callable[[str, Mapping[str, str]], str]
    scripts: dict[str, bytes]


def start(datalist: str) -> dict[str, str]:
    """The entries of an inference.json that say where everything is; each may be given on the command line."""
    return {
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": datalist,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    }


def evaluation(**options: str) -> dict[str, Any]:
    """What runs the network, with its weights, over the data; options: of the evaluator."""
    return {
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": "$@device.type == 'cuda'",
            **options,
        },
        "initialize": ["$@network_def.load_state_dict(torch.load(@bundle_root + '/models/model.pt', map_location='cpu', weights_only=True))"],
    }


def network_of(model: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the network, `network_def`: MONAI and timm their own, medssm the others."""
    if model.startswith(networks.MONAI):
        return {"_target_": model, **kwargs}
    if model.startswith(networks.TIMM):
        own = {key: value for key, value in kwargs.items() if key not in ("spatial_dims", "in_channels", "out_channels")}
        sizes = {"in_chans": kwargs["in_channels"], "num_classes": kwargs["out_channels"]}
        return {"_target_": "timm.create_model", "model_name": model.removeprefix(networks.TIMM), "pretrained": False, **sizes, **own}
    builder = "medssm.segment.networks.build" if model.startswith(networks.ENCODER) else "medssm.create_model"
    return {"_target_": builder, "name": model, **kwargs}


def intensity(how: Mapping[str, Any]) -> dict[str, Any]:
    """What scales one channel, as `segment.intensity.scaling` does."""
    if how["scheme"] in ("ct", "picture"):
        low, high, mean, deviation = (how[key] for key in ("low", "high", "mean", "deviation"))
        return {
            "_target_": "ScaleIntensityRange",
            "a_min": low,
            "a_max": high,
            "b_min": (low - mean) / deviation,
            "b_max": (high - mean) / deviation,
            "clip": True,
        }
    return {"_target_": "Identity"} if how["scheme"] == "none" else {"_target_": "Lambda", "func": _ZSCORE}


def numbered(names: Sequence[str]) -> dict[str, str]:
    """{"0": the first name, ...}, as metadata.json has channels."""
    return {str(i): name for i, name in enumerate(names)}
