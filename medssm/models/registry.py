"""The registry: models by name, and upstream's models with upstream's keywords and weights."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

from torch import Tensor, nn

from medssm.models import weights
from medssm.models.facts import Facts
from medssm.nn import sizes
from medssm.nn.convolution import fast_layers
from medssm.nn.unet import Encoder

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)
WeightMap = weights.Map | Callable[..., weights.Map]


class Model(NamedTuple):
    """What create_model builds."""

    builder: Builder
    facts: Facts


class Upstream(NamedTuple):
    """What from_upstream builds, and how the weights for it are renamed: a map, or a function of the keywords that gives one."""

    builder: Builder
    map: WeightMap


_models: dict[str, Model] = {}
_upstream: dict[str, Upstream] = {}
_FOR_ALL = ("spatial_dims", "in_channels", "out_channels")


@overload
def register_model(name: str, builder: None = None, facts: Facts | None = None) -> Callable[[B], B]: ...
@overload
def register_model(name: str, builder: B, facts: Facts | None = None) -> B: ...
def register_model(name: str, builder: Builder | None = None, facts: Facts | None = None) -> Any:
    """Enter builder(spatial_dims=, in_channels=, out_channels=, **options) under a name; a decorator where builder is left out.

    facts: what is known of the network beside its code. Raises ValueError for a name that is taken.
    """
    if builder is None:
        return lambda function: register_model(name, function, facts)
    if name in _models:
        raise ValueError(f"name: expected a new name, got {name!r}, which is taken")
    _models[name] = Model(builder, facts or Facts())
    return builder


@overload
def register_upstream(*names: str, builder: None = None, map: WeightMap | None = None) -> Callable[[B], B]: ...
@overload
def register_upstream(*names: str, builder: B, map: WeightMap | None = None) -> B: ...
def register_upstream(*names: str, builder: Builder | None = None, map: WeightMap | None = None) -> Any:
    """Enter a model that takes upstream's own keywords and weight names; a decorator where builder is left out.

    map: how upstream's weights are renamed, or a function of the keywords that gives it; None where the names are the same.
    """
    if builder is None:
        return lambda function: register_upstream(*names, builder=function, map=map)
    for name in names:
        _upstream[name] = Upstream(builder, map or weights.Map())
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """The names of models that match a shell pattern."""
    return sorted(fnmatch.filter(_models, pattern))


def list_upstream(pattern: str = "*") -> list[str]:
    """The names that from_upstream knows and that match a shell pattern."""
    return sorted(fnmatch.filter(_upstream, pattern))


def model_facts(name: str) -> Facts:
    """What is known of a model beside its code. Raises ValueError for an unknown name."""
    return _model(name).facts


def model_options(name: str) -> list[str]:
    """The keywords of a model's own, in its builder's order. Raises ValueError for an unknown name."""
    return [p.name for p in _parameters(_model(name).builder) if p.kind is not p.VAR_KEYWORD and p.name not in _FOR_ALL]


def create_model(
    name: str,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    pretrained: Path | str | None = None,
    features_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a model: logits (b, out_channels, *spatial) from (b, in_channels, *spatial).

    pretrained: a .safetensors or PyTorch file of weights, or a folder with model.safetensors; nothing is ever downloaded.
    features_only: the encoder alone, which returns a list of feature maps, the finest first, with `channels` and `strides` (cumulative).
    options: the model's own keywords. Raises ValueError for an unknown name or keyword, or weights that do not fit.
    """
    builder = _model(name).builder
    known = model_options(name)
    if not any(p.kind is p.VAR_KEYWORD for p in _parameters(builder)):
        for option in options:
            if option not in known:
                raise ValueError(f"{option}: expected one of {name}'s options {', '.join(known)}, got {option!r}")
    model = fast_layers(builder(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **options))
    if pretrained:
        weights.fit(model, weights.read(pretrained))
    return Features(model) if features_only else model


def from_upstream(name: str, state_dict: Mapping[str, Tensor] | Path | str | None = None, **kwargs: Any) -> nn.Module:
    """Build an upstream model from upstream's own constructor keywords, with upstream's quirks, and load upstream's weights.

    Classes among the keywords may be given by name ("Conv3d"). state_dict: a dictionary or a file; keys that repeat a shared tensor are
    accepted. Raises ValueError with the list of keys that are missing, unexpected or wrongly shaped.
    """
    if name not in _upstream:
        raise ValueError(f"name: expected one of {', '.join(list_upstream())}, got {name!r}")
    model = fast_layers(_upstream[name].builder(**kwargs))
    if state_dict is None:
        return model
    return weights.fit(model, upstream_map(name, **kwargs)(state_dict if isinstance(state_dict, Mapping) else weights.read(state_dict)))


def upstream_map(name: str, **kwargs: Any) -> weights.Map:
    """How upstream's weights are renamed for a model of from_upstream with these keywords."""
    map = _upstream[name].map
    return map if isinstance(map, weights.Map) else map(**kwargs)


class Features(nn.Module):
    """A model's encoder: (b, c, *spatial) -> feature maps, the finest first. Sizes that the strides do not divide are padded with zeros."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        encoder: Encoder | None = getattr(model, "encoder", None)
        if encoder is None:
            raise ValueError(f"features_only: {type(model).__name__} has no encoder")
        self.encoder, self.channels = encoder, list(encoder.output_channels)
        self.strides: list[tuple[int, ...]] = []
        reached: tuple[int, ...] = (1,) * len(encoder.strides[0])
        for step in encoder.strides:
            reached = tuple(a * b for a, b in zip(reached, step, strict=True))
            self.strides.append(reached)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, c, *spatial) -> maps (b, channels[i], *(spatial / strides[i])), rounded up."""
        maps: list[Tensor] = self.encoder(sizes.pad_to(x, self.strides[-1]))
        return maps


def _model(name: str) -> Model:
    if name not in _models:
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
    return _models[name]


def _parameters(builder: Builder) -> Iterable[inspect.Parameter]:
    return inspect.signature(builder).parameters.values()
