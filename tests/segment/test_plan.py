"""medssm plan: its rules in numbers, what a step really takes, nnU-Net's plans on our axes, and a file that train takes."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from medssm import cli, create_model, options
from medssm.errors import UserError
from medssm.models import list_models
from medssm.models.registry import model_facts
from medssm.segment import plan as module
from medssm.segment.fit import fit_patch, shrinking_patches
from medssm.segment.plan import largest, plan, planned_spacing
from medssm.segment.probe import step_memory
from medssm.segment.stages import open_stages, patch_multiples, strides_and_kernels, supervised
from medssm.segment.train import train
from tests.segment.synthetic import nnunet_folder

SHAPE = (20, 18, 16)
NNUNET = Path(__file__).parents[1] / "integrations" / "nnunet"


# -- rules


def test_the_spacing_is_the_median():
    edges = np.array([[1, 1, 1], [2, 1, 3], [3, 1, 2.0]])
    assert planned_spacing(edges)[0] == (2, 1, 2)


def test_a_coarse_axis_has_its_tenth_percentile():
    edges = np.column_stack([np.ones(11), np.ones(11), np.arange(3.0, 14)])  # 3 to 13: median 8, 10th percentile 4
    spacing, why = planned_spacing(edges)
    assert spacing == (1, 1, 4) and "up-down" in why and "10th percentile" in why
    assert planned_spacing(np.array([[1, 1, 3.0]] * 3))[0] == (1, 1, 3)  # three times is not coarse yet
    fine = np.array([[1, 1, 0.2], [1, 1, 4], [1, 1, 4.0]])
    assert planned_spacing(fine)[0] == (1, 1, 1)  # no less than the others'


def test_strides_and_kernels_of_cubes():
    strides, kernels = strides_and_kernels((128, 128, 128), (1, 1, 1), 8)
    assert strides == [[1] * 3, *[[2] * 3] * 5, *[[1] * 3] * 2]  # 128 down to 4
    assert kernels == [[3] * 3] * 8


def test_strides_and_kernels_of_thick_slices():
    strides, kernels = strides_and_kernels((24, 32, 10), (0.6, 0.6, 3), 5)
    assert strides == [[1, 1, 1], [2, 2, 1], [2, 2, 1], [1, 2, 2], [1, 1, 1]]
    assert kernels == [[3, 3, 1], [3, 3, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3]]


def test_strides_are_open_where_the_network_takes_them_and_none_are_given():
    assert open_stages("medssm_unet", {"size": "tiny"}) == 5
    assert open_stages("medssm_unet", {"features": [4, 8, 8], "depths": 1, "decoder_depths": 1}) == 3
    assert open_stages("medssm_unet", {"size": "tiny", "strides": [1, 2, 2, 2, 2]}) is None
    assert open_stages("monai.networks.nets.UNet", {}) is None and open_stages(nn.Conv3d(1, 2, 1), {}) is None


def test_networks_of_ours_learn_at_every_level_unless_told_otherwise():
    assert supervised("medssm_unet", {}) == supervised("segmamba", {"features": (4, 8)}) == {"deep_supervision": True}
    assert supervised("medssm_unet", {"deep_supervision": False}) == supervised("monai_dynunet", {}) == {}
    assert supervised("monai.networks.nets.DynUNet", {}) == supervised(nn.Conv3d(1, 2, 1), {}) == supervised("monai_unet", {}) == {}


@pytest.mark.parametrize("dims", [2, 3])
def test_every_network_with_open_strides_takes_those_of_the_rule(dims):
    found = set()
    for name in list_models():
        if dims in model_facts(name).dims and model_facts(name).task == "segment":
            kwargs = {"spatial_dims": dims, **model_facts(name).small}
            stages = open_stages(name, kwargs)
            if stages is not None:
                strides, _ = strides_and_kernels((40, 56, 40)[:dims], (1, 1, 3)[-dims:], stages)
                assert create_model(name, **kwargs, strides=strides).encoder.strides == [tuple(step) for step in strides]
                found.add(name)
    assert {"medssm_unet", "umamba_bot", "umamba_enc"} <= found


def test_a_small_volume_is_one_patch_whose_edges_the_strides_divide():
    assert patch_multiples((35, 50, 36), (1, 1, 1), 5) == [8, 8, 8]
    assert patch_multiples((200, 180, 20), (1, 1, 5), 5) == [16, 16, 4]
    assert fit_patch((35, 50, 36), (1, 1, 1), 64**3, (8, 8, 8)) == (40, 56, 40)


def test_patches_shrink_along_the_longest_axis():
    patches = list(shrinking_patches((30, 20, 9), (1, 1, 4), (8, 8, 4)))
    assert patches[0] == (32, 24, 12) and patches[1] == (32, 24, 8) and patches[-1] == (8, 8, 4)
    assert all(math.prod(a) > math.prod(b) for a, b in itertools.pairwise(patches))
    assert fit_patch((30, 30, 30), (1, 1, 1), 20_000, (16, 16, 16)) == (16, 32, 32)


@pytest.mark.parametrize(("memory", "found"), [(9_990, None), (10_000, 1), (54_321, 45), (1e9, 60)])
def test_the_search_finds_the_largest_that_fits(memory, found):
    asked = []

    def measure(size):
        asked.append(size)
        return None if size > 55 and memory < 1e9 else 9_000 + 1_000 * size + (7 * size) % 5

    assert largest(range(1, 61), float, measure, memory + 10) == found
    assert len(asked) <= 8 and max(asked) <= max(1, 7 * (found or 1))


def test_the_search_stays_below_where_memory_bends():
    assert largest(range(1, 101), float, lambda size: size**2, 2_500, probes=9) == 50


# -- what a step takes


class Holder(nn.Module):
    """Keeps so many megabytes for the backward."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.head, self.megabytes = nn.Conv3d(1, 2, 1), megabytes

    def forward(self, x):
        held = torch.ones(self.megabytes * 250_000)
        return self.head(x) + (held * self.head.weight.flatten()[0]).mean()


def test_memory_that_is_held_is_measured():
    fabric = Fabric(accelerator="cpu", devices=1)
    criterion = lambda output, label: output.mean()  # noqa: E731
    found = [step_memory(lambda megabytes=size: Holder(megabytes), criterion, fabric, (1, 1, 8, 8, 8), 2)[0] for size in (20, 100, 200)]
    assert 200e6 < found[1] < 480e6  # the tensor, its product and the product's gradient, with one more copy at most
    assert 1.4 < found[2] / found[1] < 2.8  # a copy that lives too shortly to be seen is missing in one of them


def test_a_network_that_does_not_take_the_patch_is_one_line():
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(UserError, match=r"patch: the model does not take \(8, 8, 8\)"):
        step_memory(lambda: nn.Conv3d(3, 2, 1), nn.MSELoss(), fabric, (1, 1, 8, 8, 8), 2)


# -- the network


def test_kernels_reach_the_network():
    net = create_model(
        "medssm_unet", spatial_dims=3, size="tiny", strides=[1, [2, 2, 1], 2, 2, 2], kernels=[[3, 3, 1], [3, 3, 1], 3, 3, 3], in_channels=1
    ).eval()
    kernels = {tuple(m.kernel_size) for m in net.modules() if isinstance(m, nn.Conv3d)}
    assert (3, 3, 1) in kernels and (3, 3, 3) in kernels
    with torch.no_grad():
        assert net(torch.zeros(1, 1, 24, 16, 8)).shape == (1, 2, 24, 16, 8)
    same = create_model("medssm_unet", size="tiny", kernels=[3] * 5)
    assert [p.shape for p in same.parameters()] == [p.shape for p in create_model("medssm_unet", size="tiny").parameters()]
    for wrong in ([3] * 4, 2, [[3, 3]] * 5):
        with pytest.raises(ValueError, match="kernels: expected"):
            create_model("medssm_unet", size="tiny", kernels=wrong)


# -- the command


def read_by_train(file) -> dict:
    return options.read(train, "medssm train", ["data", "run", "--config", str(file)]).values


def test_the_file_is_train_s_and_says_why(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=3, shape=SHAPE, affine=np.diag([-1, 1, 4, 1]))
    file = tmp_path / "plan.yaml"
    assert cli.main(["plan", str(folder), "-o", str(file), "--size", "tiny", "--device", "cpu", "--memory", "2GB", "--quiet"]) == 0
    text, values = file.read_text(), read_by_train(file)
    assert values["spacing"] == [1, 1, 4] and values["patch"] == [20, 20, 16] and values["batch"] == 2 and values["size"] == "tiny"
    assert values["model_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 1], [2, 2, 1], [1, 1, 2], [1, 1, 2]]
    assert values["model_kwargs"]["kernels"] == [[3, 3, 1], [3, 3, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert all("  # " in line for line in text.splitlines()[2:])
    assert "# the median of 3 case(s); along up-down, more than 3 times as coarse, the 10th percentile" in text
    assert "# the largest that fits: a step takes" in text and "of 2 GB on cpu" in text and "the whole of a median case" in text
    words = ["train", str(folder), str(tmp_path / "run"), "--config", str(file), "--max-steps", "1", "--device", "cpu", "--quiet"]
    assert cli.main(words) == 0
    kwargs = json.loads((tmp_path / "run" / "config.json").read_text())["kwargs"]
    assert kwargs["strides"] == values["model_kwargs"]["strides"] and kwargs["kernels"] == values["model_kwargs"]["kernels"]


def test_the_patch_and_the_batch_are_the_largest_that_fit(tmp_path, monkeypatch):
    folder = nnunet_folder(tmp_path / "data", cases=3, shape=(40, 40, 40))
    asked = []

    def taken(make, criterion, fabric, shape, classes):
        asked.append(shape)
        return 1_000_000 + 10 * math.prod(shape), 0.1

    monkeypatch.setattr(module, "step_memory", taken)
    monkeypatch.setattr(module, "_SHARE", 0.95)  # of 192,000 voxels
    small = plan(folder, out=tmp_path / "a.yaml", memory="1.5 MB", device="cpu", size="tiny", quiet=True)
    assert small["options"]["patch"] == [24, 32, 32] and small["options"]["batch"] == 2  # 491,520 bytes; with the next one 655,360
    large = plan(folder, out=tmp_path / "b.yaml", memory="2.7MB", device="cpu", size="tiny", quiet=True)
    assert large["options"]["patch"] == [40, 40, 40] and large["options"]["batch"] == 2
    monkeypatch.setattr(module.machine, "free_memory", lambda: 3_000_000)
    reasons = plan(folder, out=tmp_path / "d.yaml", memory="8GB", device="cpu", size="tiny", quiet=True)["reasons"]
    assert "of 0.0027 GB (8 GB are not free) on cpu" in reasons["patch"]
    with pytest.raises(UserError, match=r"memory: a step with 2 patches of 8 x 8 x 8 voxels takes 0.00101 GB, expected at most 0.001 GB"):
        plan(folder, out=tmp_path / "c.yaml", memory="1MB", device="cpu", size="tiny", quiet=True)
    assert not (tmp_path / "c.yaml").exists()


def test_networks_that_take_their_keywords_from_the_command(tmp_path, monkeypatch):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    monkeypatch.setattr(module, "step_memory", lambda make, *_: (make() and 10**6, 0.1))
    unet = {"channels": [4, 8], "strides": [2]}
    found = plan(folder, out=tmp_path / "a.yaml", model="monai.networks.nets.UNet", model_kwargs=unet, device="cpu", quiet=True)
    assert found["options"]["patch"] == [32, 32, 32] and found["options"]["model_kwargs"] == unet and found["reasons"]["model_kwargs"] == "as asked"
    assert read_by_train(tmp_path / "a.yaml")["model_kwargs"] == unet
    mamba = plan(folder, out=tmp_path / "b.yaml", model="umamba_bot", device="cpu", quiet=True)["options"]["model_kwargs"]
    assert mamba["features"] == [32, 64, 128] and mamba["strides"] == [[1] * 3, [2] * 3, [2] * 3] and len(mamba["kernels"]) == 3
    own = plan(folder, out=tmp_path / "c.yaml", model_kwargs={"features": [8, 16]}, device="cpu", quiet=True)["options"]
    assert own["model_kwargs"]["features"] == [8, 16] and own["model_kwargs"]["strides"] == [[1] * 3, [2] * 3] and "size" not in own


def test_slices(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(32, 24, 1), affine=np.diag([0.5, 1, 5, 1]))
    found = plan(folder, out=tmp_path / "plan.yaml", device="cpu", spatial_dims=2, size="tiny", quiet=True)["options"]
    assert found["patch"] == [32, 24] and found["spacing"] == [0.5, 1, 5] and found["batch"] == 12
    assert found["model_kwargs"]["strides"] == [[1, 1], [2, 1], [2, 2], [2, 2], [1, 1]]


@pytest.mark.parametrize("generation", ["old", "new"])
def test_nnunet_s_plans_on_our_axes(tmp_path, generation):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    found = plan(folder, out=tmp_path / "plan.yaml", plans=NNUNET / f"plans_{generation}.json", size="tiny", quiet=True)["options"]
    assert (found["spacing"], found["patch"], found["batch"]) == ([0.6, 0.6, 3], [24, 32, 10], 2)  # z, y, x in nnU-Net
    assert found["model_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 1], [2, 2, 2], [2, 2, 1], [1, 1, 1]]
    assert found["model_kwargs"]["kernels"] == [[3, 3, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert read_by_train(tmp_path / "plan.yaml")["patch"] == [24, 32, 10]
    assert f"# plans_{generation}.json: 3d_fullres, axes turned to RAS" in (tmp_path / "plan.yaml").read_text()
    flat = plan(folder, out=tmp_path / "2d.yaml", plans=NNUNET / f"plans_{generation}.json", size="tiny", spatial_dims=2, quiet=True)["options"]
    assert (flat["spacing"], flat["patch"], flat["batch"]) == ([0.6, 0.6, 1], [32, 36], 3)


def test_transposed_and_turned_axes(tmp_path):
    table = json.loads((NNUNET / "plans_new.json").read_text())
    table["transpose_forward"] = [2, 0, 1]  # x, z, y
    (tmp_path / "plans.json").write_text(json.dumps(table))
    folder = nnunet_folder(tmp_path / "a", cases=2, shape=SHAPE)
    assert plan(folder, out=tmp_path / "a.yaml", plans=tmp_path / "plans.json", quiet=True)["options"]["patch"] == [10, 24, 32]
    sagittal = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # the file's axes run along y, z, x
    folder = nnunet_folder(tmp_path / "b", cases=2, shape=SHAPE, affine=sagittal)
    found = plan(folder, out=tmp_path / "b.yaml", plans=NNUNET / "plans_new.json", quiet=True)["options"]
    assert (found["patch"], found["spacing"]) == ([10, 24, 32], [3, 0.6, 0.6])


def test_errors(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    with pytest.raises(UserError, match="memory: expected a size as in 8GB or 500MB, got 'much'"):
        plan(folder, out=tmp_path / "plan.yaml", memory="much", device="cpu", quiet=True)
    with pytest.raises(UserError, match=r"dataset.json: expected nnU-Net's plans with the configuration 3d_fullres, got none"):
        plan(folder, out=tmp_path / "plan.yaml", plans=folder / "dataset.json", quiet=True)
    with pytest.raises(UserError, match="name one of the two"):
        plan(folder, out=tmp_path / "plan.yaml", plans=NNUNET / "plans_new.json", memory="1GB", quiet=True)
    with pytest.raises(UserError, match=r"dataset.json is a file that is read"):
        plan(folder, out=folder / "dataset.json", plans=NNUNET / "plans_new.json", overwrite=True, quiet=True)
    (tmp_path / "mine.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match="is there already"):
        plan(folder, out=tmp_path / "mine.yaml", plans=NNUNET / "plans_new.json", quiet=True)
