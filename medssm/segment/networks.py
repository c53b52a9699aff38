"""Networks by name, and the folder that a trained one is kept in: config.json, model.safetensors and, where it was validated, the best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import medssm
from medssm.errors import UserError
from medssm.files import read_json, write_bytes, write_json
from medssm.nn.convolution import fast_convolutions
from medssm.segment.losses import finest_first

MONAI = "monai.networks.nets."
WEIGHTS, BEST, CONFIG = "model.safetensors", "model_best.safetensors", "config.json"


def build(name: str, **kwargs: Any) -> nn.Module:
    """A medssm model by its registered name, or one of MONAI's by its full one, `monai.networks.nets.UNet`.

    Nothing else is ever imported by name: a weights folder comes from anyone.
    """
    try:
        if name.startswith(MONAI):
            from monai.networks import nets

            constructor = getattr(nets, name.removeprefix(MONAI), None)
            if not (isinstance(constructor, type) and issubclass(constructor, nn.Module)):
                raise UserError(f"model: MONAI has no network {name}")
            return constructor(**kwargs)
        return medssm.create_model(name, **kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model: {name} with {kwargs}: {error}") from error


def describe(model: str | nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a network: how to build it, or, where a module was given, only what it was."""
    if isinstance(model, nn.Module):
        return {"model": None, "class": f"{type(model).__module__}.{type(model).__qualname__}", "medssm": medssm.__version__}
    return {"model": model, "kwargs": kwargs, "medssm": medssm.__version__}


def memory_format(spatial_dims: int) -> torch.memory_format:
    """Channels last, for weights and input alike: PyTorch's CPU convolutions run without reordering."""
    return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last


def placed(network: nn.Module, device: torch.device, spatial_dims: int) -> nn.Module:
    """The network on a device, with its weights in `memory_format` and the fast convolutions."""
    return fast_convolutions(network).to(device, memory_format=memory_format(spatial_dims))  # type: ignore[call-overload]  # torch's annotations lack it


def save(folder: Path, network: nn.Module, config: Mapping[str, Any]) -> None:
    """Write the weights and how to build the network; the weights last, so that a folder that has them is whole."""
    write_json(folder / CONFIG, config)
    save_weights(folder / WEIGHTS, network)


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the weights alone, whole or not at all."""
    # clone: safetensors refuses tensors that share memory, as tied weights do
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    write_bytes(path, safetensors.torch.save(weights))


def load(folder: Path, network: nn.Module | None = None, name: str = WEIGHTS) -> nn.Module:
    """The network of a folder with its weights, of the file `name`; `network` is needed for one that was given to `train` as a module."""
    config = read_json(folder / CONFIG)
    if network is None:
        if not config.get("model"):
            raise UserError(f"{folder}: trained from a {config.get('class')} given as a module: pass it as model")
        network = build(config["model"], **config["kwargs"])
    try:
        weights = safetensors.torch.load_file(folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / name}: not a readable safetensors file ({error})") from error
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / name}: does not fit the network: {' '.join(str(error).split())[:400]}") from error
    return network


def check_patch(network: nn.Module, patch: Sequence[int], in_channels: int, out_channels: int, device: torch.device) -> None:
    """One patch of zeros through the network: UserError for what does not fit, before any time is spent."""
    training, wanted = network.training, (1, out_channels, *patch)
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(1, in_channels, *patch, device=device))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"patch: the model does not take {tuple(patch)}: {str(error).splitlines()[0]}") from error
    finally:
        network.train(training)
    logits = finest_first(output, len(wanted))[0]
    if tuple(logits.shape) != wanted:
        raise UserError(f"model: expected logits of the shape {wanted}, got {tuple(logits.shape)}")
