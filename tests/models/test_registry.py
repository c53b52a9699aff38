"""A network is one file of medssm/models and its line in medssm/models/__init__.py: whatever else it should have is looked for here."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import medssm
from medssm import models
from tests.conftest import KINDS
from tests.parity import parity_cards

ROOT = Path(__file__).parents[2]
CARDS = parity_cards.names()


def upstream_names(name):
    """The names under which from_upstream has the network, one per size where upstream has a function for each."""
    return [upstream for upstream in models.list_upstream() if upstream == name or upstream.startswith(f"{name}_")]


def lacks(name):
    """What a registered network should have and has not."""
    facts, builder = models.model_facts(name), models.registry._models[name].builder
    upstream = upstream_names(name)
    parts = {
        "a source": facts.source,
        "a licence": facts.licence,
        "an arXiv number or a DOI": re.fullmatch(r"\d{4}\.\d{5}|10\.\d{4,}/\S+", facts.paper) or facts.source == "this project",
        "a task": facts.task in ("segment", "classify"),
        "a docstring": inspect.getdoc(getattr(builder, "func", builder)),
        "a class of from_upstream, or a word on parity": upstream or facts.parity,
        "a parity card, or a word on parity": set(upstream) & set(CARDS.values()) or facts.parity,
        "a row of docs/models.md": f"\n| {name} | {', '.join(map(str, facts.dims))} |" in (ROOT / "docs" / "models.md").read_text(),
        "a file of its own": Path(inspect.getsourcefile(inspect.unwrap(getattr(builder, "func", builder)))).parent == ROOT / "medssm" / "models",
    }
    return [part for part, there in parts.items() if not there] + runs(name, facts.dims[0])


def runs(name, dims):
    """What goes wrong with the small network, forward and backward."""
    facts = models.model_facts(name)
    torch.manual_seed(0)
    try:
        model = medssm.create_model(name, dims, 2, 3, **facts.small)
        y = model(torch.randn(2, 2, *(32,) * dims))
        y.square().mean().backward()
    except Exception as error:
        return [f"a small example that runs in {dims}D ({error})"]
    shape = (2, 3) if facts.task == "classify" else (2, 3, *(32,) * dims)
    return [] if y.shape == shape else [f"logits of the shape {shape} in {dims}D, not {tuple(y.shape)}"]


@pytest.mark.parametrize("name", medssm.list_models())
def test_every_network_is_whole(name):
    assert lacks(name) == []


def test_what_a_network_lacks_is_found(monkeypatch):
    monkeypatch.setattr(models.registry, "_models", dict(models.registry._models))
    medssm.register_model("bare", lambda spatial_dims, in_channels, out_channels: torch.nn.Identity())
    found = lacks("bare")
    assert {"a source", "a licence", "a docstring", "a parity card, or a word on parity", "a row of docs/models.md", "a file of its own"} <= set(
        found
    )
    assert any(part.startswith("a small example that runs in 2D") for part in found)


def test_every_file_of_a_network_is_imported():
    """A file that __init__.py does not name would register nothing."""
    registering = {
        path.stem for path in (ROOT / "medssm" / "models").glob("*.py") if re.search(r"^ *@?register_(model|upstream)\(", path.read_text(), re.M)
    }
    line = re.search(r"from medssm\.models import \((.*?)^\)", (ROOT / "medssm" / "models" / "__init__.py").read_text(), re.M | re.S).group(1)
    assert registering == set(re.findall(r"^    (\w+),$", line, re.M))


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_its_class(card):
    assert CARDS[card] in models.list_upstream()


def test_the_kinds_of_the_short_tests_are_networks():
    """A name that no network has would leave its kind out of `make test` without a word."""
    assert set(medssm.list_models()) >= KINDS
