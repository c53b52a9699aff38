"""The registry: models by name, and upstream's models with upstream's keywords and weights."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from medssm.models import weights
from medssm.nn.unet import pad_to

_models: dict[str, Callable[..., nn.Module]] = {}
_upstream: dict[str, tuple[Callable[..., nn.Module], weights.Map | Callable[..., weights.Map]]] = {}


def register_model(name: str, builder: Callable[..., nn.Module] | None = None):
    """Enter builder(spatial_dims=, in_channels=, out_channels=, **options) under a name; a decorator where builder is left out."""
    if builder is None:
        return lambda function: register_model(name, function)
    if name in _models:
        raise ValueError(f"name: expected a new name, got {name!r}, which is taken")
    _models[name] = builder
    return builder


def register_upstream(*names: str, builder: Callable[..., nn.Module], map: weights.Map | Callable[..., weights.Map] | None = None) -> None:
    """Enter a model that takes upstream's own keywords and weight names. map: how its weights are renamed, or a function of the keywords that
    says it."""
    for name in names:
        _upstream[name] = (builder, map or weights.Map())


def list_models(pattern: str = "*") -> list[str]:
    """The names of models that match a shell pattern."""
    return sorted(fnmatch.filter(_models, pattern))


def create_model(
    name: str,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    pretrained: Path | str | None = None,
    features_only: bool = False,
    **options,
) -> nn.Module:
    """Build a model: logits (b, out_channels, *spatial) from (b, in_channels, *spatial).

    pretrained: a .safetensors or PyTorch file of weights, or a folder with model.safetensors; nothing is ever downloaded.
    features_only: the encoder alone, which returns a list of feature maps, the finest first, with `channels` and `strides` (cumulative).
    options: the model's own keywords. Raises ValueError for an unknown name or keyword, or weights that do not fit.
    """
    if name not in _models:
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
    builder = _models[name]
    _check_options(name, builder, options)
    model = builder(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **options)
    if pretrained:
        weights.fit(model, weights.read(pretrained))
    return Features(model) if features_only else model


def from_upstream(name: str, state_dict: Mapping[str, Tensor] | Path | str | None = None, **kwargs) -> nn.Module:
    """Build an upstream model from upstream's own constructor keywords, with upstream's quirks, and load upstream's weights.

    Classes among the keywords may be given by name ("Conv3d"). state_dict: a dictionary or a file; keys that repeat a shared tensor are
    accepted. Raises ValueError with the list of keys that are missing, unexpected or wrongly shaped.
    """
    if name not in _upstream:
        raise ValueError(f"name: expected one of {', '.join(sorted(_upstream))}, got {name!r}")
    builder, map = _upstream[name]
    model = builder(**kwargs)
    if state_dict is None:
        return model
    if not isinstance(map, weights.Map):
        map = map(**kwargs)
    return weights.fit(model, map(state_dict if isinstance(state_dict, Mapping) else weights.read(state_dict)))


class Features(nn.Module):
    """A model's encoder: (b, c, *spatial) -> feature maps, the finest first. Sizes that the strides do not divide are padded with zeros."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if not hasattr(model, "encoder"):
            raise ValueError(f"features_only: {type(model).__name__} has no encoder")
        self.encoder, self.strides = model.encoder, []
        self.channels = list(model.encoder.output_channels)
        reached = (1,) * len(model.encoder.strides[0])
        for step in model.encoder.strides:
            reached = tuple(a * b for a, b in zip(reached, step, strict=True))
            self.strides.append(reached)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder(pad_to(x, self.strides[-1]))


def _check_options(name: str, builder: Callable, options: dict) -> None:
    parameters = inspect.signature(builder).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [p for p in parameters if p not in ("spatial_dims", "in_channels", "out_channels")]
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: expected one of {name}'s options {', '.join(known)}, got {option!r}")
