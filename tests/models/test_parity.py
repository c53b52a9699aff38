"""Parity with upstream: weights drawn from state-dict keys, outputs against samples of what upstream's own code computed."""

import json
from pathlib import Path

import pytest
import torch

import medssm
from medssm.models.registry import upstream_map
from tests.parity import parity_cards

CARDS = parity_cards.names()  # {card: the name that from_upstream has for its class}
# LightM-UNet normalises voxels that a ReLU has set to zero, again and again: a rounding error grows by a factor of ten thousand. Its card,
# recorded in float32, is 0.043 standard deviations away from the same code in float64, with which ours agrees to 1e-10.
LOOSE = {"lightm_3d": 0.1}
# Recorded with the paper's formula; other cards of WKV with the published kernels' arithmetic.
MORE = {name: {"wkv_mode": "exact"} for name in ("rwkvunet_T_formula", "vrwkv_tiny_formula")}
# A hundred million weights, or a map of 128^3: in the short tests a card of one block and a smaller network stand for them.
LARGE = {"slimunetr", "unetrpp_acdc"}
# Whose reference runs in the short tests too: a scan, WKV and linear attention. Every other card's does in the long ones.
REFERENCE = {"vmamba_v0", "vrwkv_tiny_formula", "mlla_block"}
ALL = [pytest.param(name, marks=pytest.mark.thorough) if name in LARGE else name for name in CARDS]
RUNS = [
    pytest.param(name, backend, marks=[pytest.mark.thorough] if name in LARGE or (backend == "reference" and name not in REFERENCE) else [])
    for name in CARDS
    for backend in ("reference", "native")
]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_card(name, backend):
    card = parity_cards.load(name)
    state = parity_cards.state_dict(card)
    model = medssm.from_upstream(CARDS[name], state, **card["kwargs"], **MORE.get(name, {})).eval()
    with torch.no_grad(), medssm.use_backend(backend, strict=True):
        parity_cards.compare(card, model(*parity_cards.inputs(card), *card.get("extra_args", [])), atol_of_std=LOOSE.get(name, 1e-3))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    distinct = sum(t.numel() for t in {id(t): t for k, t in state.items() if not k.endswith(buffers)}.values())
    assert sum(p.numel() for p in model.parameters()) == card["params"] == distinct


@pytest.mark.each_network
@pytest.mark.parametrize("name", ALL)
def test_weights_that_do_not_fit_are_listed(name):
    card = parity_cards.load(name)
    state = parity_cards.state_dict(card)
    last = next(k for k in reversed(state) if "decoder.encoder" not in k and "all_modules" not in k)
    renamed = upstream_map(CARDS[name], **card["kwargs"])
    del state[last]
    state["surprise"] = torch.zeros(3)
    first = next(iter(state))
    state[first] = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="1 wrongly shaped, 1 missing, 1 unexpected") as error:
        medssm.from_upstream(CARDS[name], state, **card["kwargs"])
    assert f"missing    {next(iter(renamed({last: None})))}" in str(error.value) and "unexpected surprise (3,)" in str(error.value)


COUNTS = json.loads((Path(parity_cards.__file__).parent / "counts.json").read_text())


@pytest.mark.parametrize("entry", COUNTS, ids=lambda e: e["case"])
def test_parameter_counts_of_upstreams_sizes(entry):
    with torch.device("meta"):
        model = medssm.from_upstream(entry["model"], **entry["kwargs"])
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    if "umamba_" not in entry["case"]:  # upstream's U-Mamba lists its tensors several times
        assert len(model.state_dict()) == entry["n_state"] - entry.get("dropped", 0)  # dropped: MLLA's rotations, what others list twice
