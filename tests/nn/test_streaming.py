"""A network over slabs computes what it computes for the whole volume, and asks for no more memory than it says."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from medssm.models.medssm_unet import medssm_unet
from medssm.models.registry import create_model
from medssm.nn import streaming
from medssm.nn.carried import carried
from medssm.nn.mixers import MIXERS
from medssm.nn.streaming import View, needs, streamed
from medssm.orders import hilbert, snake
from medssm.scratch import Scratch


def network(**options):
    torch.manual_seed(0)
    made = medssm_unet(**{"size": "tiny", "out_channels": 3, **options}).eval()
    for layer in made.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):  # as after a training
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return made


def both(made, shape, folder, slab=1000, memory=0, channels=1):
    """The logits of the whole volume, and those of slabs of `slab` bytes, rows where that is less, all (*spatial, classes)."""
    volume = torch.randn(*shape, channels)
    with torch.inference_mode():
        whole = made(volume.movedim(-1, 0)[None])
    whole = (whole[0] if isinstance(whole, list) else whole)[0].movedim(0, -1)
    with Scratch(memory, folder, "a") as scratch:
        found = streamed(made, View(volume.shape, lambda rows: volume[rows]), scratch, slab=slab)
        assert found.shape == whole.shape
        return whole, found[slice(0, shape[0])].clone()


# kda and rwkv7 are the layer of gdn2 by other rules.
every = pytest.mark.parametrize("mixer", [pytest.param(name, marks=pytest.mark.thorough if name in ("kda", "rwkv7") else ()) for name in MIXERS])


@pytest.mark.parametrize("shape", [(32, 32, 32), (41, 19, 22), (7, 33, 5)])
@every
def test_slabs_give_the_whole_volume(tmp_path, mixer, shape):
    whole, found = both(network(mixer=mixer), shape, tmp_path)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert whole.std() > 0.1


@every
def test_scans_carry_their_states(tmp_path, mixer, monkeypatch):
    """At the finest stage too; a state that is lost between slabs shows."""
    made = network(mixer=mixer, features=(8, 16), depths=(1, 1), decoder_depths=(0,), scans_from=0)
    whole, found = both(made, (24, 10, 6), tmp_path)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)

    def forgetful(mixer, spatial):
        parts = carried(mixer, spatial)
        scans = [(order, lambda u, x, state, total, scan=scan: scan(u, x, None, total)) for order, scan in parts.scans]
        return parts._replace(scans=scans, totals=parts.totals and (lambda u, row, total: parts.totals(u, row, None)))

    monkeypatch.setattr(streaming, "carried", forgetful)
    whole, found = both(made, (24, 10, 6), tmp_path)
    assert (found - whole).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"size": "small", "features": (8, 8, 16)},
        {"strides": (1, (1, 2, 2), (2, 1, 2), 2, 2), "deep_supervision": True},
        {"strides": (1, (1, 2, 2), (1, 2, 2), 2, 2), "kernels": ((1, 3, 3), (1, 3, 3), 3, (5, 3, 3), 3)},
        {"size": "small", "features": (8, 12, 16), "depths": (1, 1, 1), "decoder_depths": (1, 2), "strides": (1, 2, 3)},
        {"in_channels": 2, "mixer": "delta"},
    ],
)
def test_other_networks(tmp_path, options):
    if "features" in options and "depths" not in options:
        options = {**options, "depths": (1, 1, 1), "decoder_depths": (1, 1)}
    whole, found = both(network(**options), (26, 12, 15), tmp_path, channels=options.get("in_channels", 1))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_two_dimensions_and_any_slab(tmp_path):
    made = network(spatial_dims=2)
    for slab, memory in ((1, 0), (20_000, 10**6), (10**9, 10**9)):
        whole, found = both(made, (53, 38), tmp_path, slab, memory)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [snake(), hilbert()])
def test_a_mixer_that_sees_all_runs_whole_where_it_fits_and_is_named_where_not(tmp_path, order):
    made = network(features=(8, 16, 16), depths=(1, 1, 1), decoder_depths=(1, 1))
    made.encoder.stages[2][1].mixer.orders = [order] * 6
    whole, found = both(made, (16, 12, 12), tmp_path, slab=100_000)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    with pytest.raises(
        ValueError, match=r"encoder\.stages\.2\.1\.mixer \(SSND\) cannot be streamed: it needs its whole map at once, .*sliding windows"
    ):
        both(made, (16, 12, 12), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("umamba_bot", r"\(InstanceNorm3d\) cannot be streamed: its statistics need the whole map; sliding windows"),
        ("segmamba", r"cannot be streamed: .*; sliding windows take any network"),
        ("lightm_unet", r"cannot be streamed: .*; sliding windows take any network"),
    ],
)
def test_other_networks_are_refused_by_name(name, message):
    made = create_model(name, in_channels=1, out_channels=2).eval()
    with pytest.raises(ValueError, match=message):
        needs(made, (32, 32, 32), 1)


def test_training_is_refused():
    with pytest.raises(ValueError, match="network: expected it in eval mode"):
        needs(network().train(), (32, 32, 32), 1)
    with pytest.raises(ValueError, match="expected spatial axis 1 to be a multiple of 16"):
        needs(network(input_size="strict"), (32, 30, 32), 1)


@every
def test_what_is_needed_is_known_before(tmp_path, mixer):
    made, written, live = network(mixer=mixer), [], []

    class Watched(Scratch):
        def store(self, *shape, device=None):
            store = super().store(*shape)
            live.append(sum(one.memory for one in self._stores))
            return store

    needed = needs(made, (32, 20, 17), 1, 5_000)
    volume = torch.randn(32, 20, 17, 1)
    with Watched(2**40, tmp_path, "a") as scratch:
        streamed(made, View(volume.shape, lambda rows: volume[rows]), scratch, slab=5_000, show=written.append)
    assert max(live) == needed.maps and written[-1] == needed.written and written == sorted(written)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_length(tmp_path):
    code = """
import sys, pathlib, torch
from medssm.models.medssm_unet import medssm_unet
from medssm.nn.streaming import View, needs, streamed
from medssm.scratch import Scratch

def peak():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

made, slab = medssm_unet(size="tiny").eval(), 2**20
def run(length, wide=96):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    with Scratch(0, pathlib.Path(sys.argv[1]), "a") as scratch:
        streamed(made, View((length, wide, wide, 1), lambda rows: torch.ones(rows.stop - rows.start, wide, wide, 1)), scratch, slab=slab)
    return peak()
begun = run(16, 16)  # with what a first call loads
print(run(96) - begun, run(192) - begun, needs(made, (192, 96, 96), 1, slab).memory, needs(made, (192, 96, 96), 1, slab).maps)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    short, long, said, maps = map(int, done.stdout.split())
    assert long < 1.6 * short and long < said and long < maps / 2, done.stdout
