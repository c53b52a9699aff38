"""Networks by name, and the folder that a trained one is kept in: config.json, model.safetensors and, where it was validated, the best weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn

import medssm
from medssm.compress.steps import restructured
from medssm.errors import UserError
from medssm.files import first_line, read_json, write_bytes, write_json
from medssm.nn import Classifier, Encoder
from medssm.nn.convolution import fast_layers
from medssm.nn.convolution import memory_format as memory_format
from medssm.nn.convolution import placed as placed
from medssm.segment.losses import finest_first
from medssm.tasks import CLASSIFY, FITTED, is_fitted

MONAI, TIMM, ENCODER = "monai.networks.nets.", "timm:", "encoder:"
WEIGHTS, BEST, CONFIG = "model.safetensors", "model_best.safetensors", "config.json"


def build(name: str, **kwargs: Any) -> nn.Module:
    """A medssm model by its registered name; one of MONAI's by its full one, `monai.networks.nets.UNet`; for a classification one of timm's by
    `timm:resnet18`, or the encoder of a medssm model that segments by `encoder:medssm_unet`, with a linear layer on the mean of its coarsest map.

    Nothing else is ever imported by name, and nothing downloaded: a weights folder comes from anyone.
    """
    try:
        if name.startswith(TIMM):
            return _of_timm(name.removeprefix(TIMM), **kwargs)
        if name.startswith(ENCODER):
            segments = medssm.create_model(name.removeprefix(ENCODER), **kwargs)
            if not hasattr(segments, "encoder"):
                raise UserError(f"model: {name.removeprefix(ENCODER)} has no encoder of its own")
            return fast_layers(Classifier(cast(Encoder, segments.encoder), kwargs["out_channels"]))
        if name.startswith(MONAI):
            from monai.networks import nets

            constructor = getattr(nets, name.removeprefix(MONAI), None)
            if not (isinstance(constructor, type) and issubclass(constructor, nn.Module)):
                raise UserError(f"model: MONAI has no network {name}")
            return constructor(**kwargs)
        return medssm.create_model(name, **kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model: {name} with {kwargs}: {error}") from error


def _of_timm(name: str, *, spatial_dims: int, in_channels: int, out_channels: int, **kwargs: Any) -> nn.Module:
    """One of timm's classifiers with random weights. timm would fetch what a name such as hf-hub:... stands for, so only its own names are taken."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"model: {TIMM}{name} needs the package timm: pip install timm") from error
    if spatial_dims != 2:
        raise UserError(f"model: {TIMM}{name}: timm's networks take planes, and spatial_dims is {spatial_dims}")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 1, 0.7)
        raise UserError(f"model: timm {timm.__version__} has no network {name!r}{f', did you mean {close[0]}?' if close else ''}")
    return timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=out_channels, **kwargs)


def describe(model: str | nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a network: how to build it, or, where a module was given, only what it was."""
    if isinstance(model, nn.Module):
        return {"model": None, "class": f"{type(model).__module__}.{type(model).__qualname__}", "medssm": medssm.__version__}
    return {"model": model, "kwargs": kwargs, "medssm": medssm.__version__}


def save(folder: Path, network: nn.Module, config: Mapping[str, Any]) -> None:
    """Write the weights and how to build the network; the weights last, so that a folder that has them is whole."""
    write_json(folder / CONFIG, config)
    save_weights(folder / WEIGHTS, network)


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the weights alone, whole or not at all."""
    # clone: safetensors refuses tensors that share memory, as tied weights do
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    write_bytes(path, safetensors.torch.save(weights))


def check_run(run: Path, argument: str, task: str | None = None) -> None:
    """UserError that names the argument, for what is not the folder of one finished training, or not of the task (`segment` or `classify`)."""
    if not run.is_dir():
        raise UserError(f"{argument}: {run}: expected a folder that medssm train wrote, {'got a file' if run.exists() else 'there is none'}")
    if not (run / FITTED).is_file():
        folds = sorted(file.parent.name for file in run.glob(f"*/{FITTED}"))
        raise UserError(
            f"{argument}: {run}: expected one network, got the folds {', '.join(folds)}: name one of them"
            if folds
            else f"{argument}: {run}: no {FITTED} in it: not written by medssm train"
        )
    if not (run / WEIGHTS).is_file():
        raise UserError(f"{argument}: {run / WEIGHTS}: no such file (the training is not finished)")
    if task is not None and is_fitted(run / FITTED) != (task == CLASSIFY):
        kinds = ("a network that segments", "a classifier")
        wanted, found = kinds if task != CLASSIFY else reversed(kinds)
        raise UserError(f"{argument}: {run}: expected {wanted}, got {found}")


def load(folder: Path, network: nn.Module | None = None, name: str = WEIGHTS) -> nn.Module:
    """The network of a folder with its weights, of the file `name`; `network` is needed for one that was given to `train` as a module."""
    config = read_json(folder / CONFIG)
    if network is None and not config.get("model"):
        raise UserError(f"{folder}: trained from a {config.get('class')} given as a module: pass it as model")
    return load_weights(folder / name, of_config(config, network))


def of_config(config: Mapping[str, Any], network: nn.Module | None = None) -> nn.Module:
    """The network that a config.json describes, compressed where it says so, without trained weights; `network` as for `load`."""
    network = build(config["model"], **config["kwargs"]) if network is None else network
    return restructured(network, config.get("compression", []))


def count_parameters(config: Mapping[str, Any]) -> int:
    """The parameters of the network that a config.json describes; in 8 bits there are as many as before."""
    steps = [step for step in config.get("compression", []) if step["kind"] != "int8"]
    return sum(p.numel() for p in of_config({**config, "compression": steps}).parameters())


def load_weights(path: Path, network: nn.Module) -> nn.Module:
    """The network with the weights of a file. Raises UserError if it cannot be read or does not fit."""
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the network: {' '.join(str(error).split())[:400]}") from error
    return network


def check_patch(network: nn.Module, patch: Sequence[int], in_channels: int, out_channels: int, device: torch.device) -> None:
    """One patch of zeros through the network: UserError for what does not fit, before any time is spent."""
    _check("patch", network, (in_channels, *patch), (out_channels, *patch), device)


def check_classifier(network: nn.Module, shape: Sequence[int], in_channels: int, out_channels: int, device: torch.device) -> None:
    """`check_patch` for a network that gives one logit for each class."""
    _check("shape", network, (in_channels, *shape), (out_channels,), device)


def _check(argument: str, network: nn.Module, given: tuple[int, ...], out: tuple[int, ...], device: torch.device) -> None:
    training, wanted = network.training, (1, *out)
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(1, *given, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:  # timm asserts
        raise UserError(f"{argument}: the model does not take {given[1:]}: {first_line(error)}") from error
    finally:
        network.train(training)
    logits = finest_first(output, len(wanted))[0]
    if tuple(logits.shape) != wanted:
        raise UserError(f"model: expected logits of the shape {wanted}, got {tuple(logits.shape)}")
