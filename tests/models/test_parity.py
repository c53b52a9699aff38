"""Parity with upstream: weights drawn from state-dict keys, outputs against samples of what upstream's own code computed."""

import json
from pathlib import Path

import pytest
import torch

import medssm
from tests.parity import parity_cards

CARDS = {"umamba_bot_2d": "umamba_bot", "umamba_enc_2d_chantok": "umamba_enc", "umamba_enc_3d": "umamba_enc", "mamba_v2_mixer": "bimamba_v2",
         "mamba_v3_mixer": "bimamba_v3", "ss2d_corev0_mixer": "ss2d"}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", CARDS)
def test_card(name, backend):
    card = parity_cards.load(name)
    state = parity_cards.state_dict(card)
    model = medssm.from_upstream(CARDS[name], state, **card["kwargs"]).eval()
    with torch.no_grad(), medssm.use_backend(backend, strict=True):
        parity_cards.compare(card, model(*parity_cards.inputs(card)))
    distinct = sum(t.numel() for t in {id(t): t for t in state.values()}.values())
    assert sum(p.numel() for p in model.parameters()) == card["params"] == distinct


@pytest.mark.parametrize("name", CARDS)
def test_weights_that_do_not_fit_are_listed(name):
    card = parity_cards.load(name)
    state = parity_cards.state_dict(card)
    last = next(k for k in reversed(state) if "decoder.encoder" not in k and "all_modules" not in k)
    del state[last]
    state["surprise"] = torch.zeros(3)
    first = next(iter(state))
    state[first] = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="1 wrongly shaped, 1 missing, 1 unexpected") as error:
        medssm.from_upstream(CARDS[name], state, **card["kwargs"])
    assert f"missing    {last}" in str(error.value) and "unexpected surprise (3,)" in str(error.value)


COUNTS = json.loads((Path(parity_cards.__file__).parent / "counts.json").read_text())


@pytest.mark.parametrize("entry", COUNTS, ids=lambda e: e["case"])
def test_parameter_counts_of_upstreams_sizes(entry):
    with torch.device("meta"):
        model = medssm.from_upstream("umamba_bot" if "bot" in entry["case"] else "umamba_enc", **entry["kwargs"])
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
