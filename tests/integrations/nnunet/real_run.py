"""nnU-Net itself on a real brain at 3 mm: plan, preprocess, train, validate and predict with rewritten plans, and trainers of both makes.

`make test-integrations` runs it; its name keeps it out of `make test`. One hemisphere is trained on and validated, the other predicted: after an
epoch of some iterations this shows that everything fits together, not how accurate anything is.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm import cli
from medssm.segment.demo.data import load_brain

DATASET, CONFIGURATION, STEP = "Dataset501_Brain", "3d_fullres", 3
BIN = Path(sys.executable).parent
SHIM = Path(__file__).with_name("torchvision_shim")
OPTIONS = {"umamba_bot": ["features=[8,16,32,32]"], "ultralight_vmunet": []}  # with heads at several levels, and with one


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    """The folder of a data set that nnU-Net planned and preprocessed, with plans for each model; nnU-Net's environment is set."""
    folder = tmp_path_factory.mktemp("nnunet")
    environment = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    environment |= {"nnUNet_extTrainer": path_of_trainers(), "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f",
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(SHIM), os.environ.get("PYTHONPATH"))))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        write_dataset(folder / "raw" / DATASET)
        run("nnUNetv2_plan_and_preprocess", "-d", 501, "-c", CONFIGURATION, "-np", 1, "-npfp", 1, "--verify_dataset_integrity", "--no_pbar",
            nnUNet_n_proc_DA="1")
        plans = folder / "preprocessed" / DATASET / "nnUNetPlans.json"
        for model, options in OPTIONS.items():
            assert cli.main(["nnunet", "plans", str(plans), "--model", model, "--configuration", CONFIGURATION, "--quiet", *options]) == 0
        yield folder


@pytest.mark.parametrize("model", OPTIONS)
def test_train_validate_and_predict(nnunet, model):
    settings = ("-tr", "nnUNetTrainerMedssmShort", "-p", f"nnUNetPlans_{model}", "-device", "cpu")
    run("nnUNetv2_train", 501, CONFIGURATION, "all", *settings)
    trained = nnunet / "results" / DATASET / f"nnUNetTrainerMedssmShort__nnUNetPlans_{model}__{CONFIGURATION}" / "fold_all"
    summary = json.loads((trained / "validation" / "summary.json").read_text())
    dice = summary["foreground_mean"]["Dice"]
    raw = nnunet / "raw" / DATASET
    run("nnUNetv2_predict", "-i", raw / "imagesTs", "-o", nnunet / model, "-d", 501, "-c", CONFIGURATION, "-f", "all", *settings, "--disable_tta",
        "-npp", 1, "-nps", 1)
    found, image = nib.load(nnunet / model / "left.nii.gz"), nib.load(raw / "imagesTs" / "left_0000.nii.gz")
    labels = np.asanyarray(nib.load(raw / "labelsTs" / "left.nii.gz").dataobj)
    assert found.shape == image.shape and np.allclose(found.affine, image.affine, atol=1e-4)
    predicted = np.asanyarray(found.dataobj)
    assert set(np.unique(predicted)) <= set(range(8)) and 0 <= dice <= 1
    scores = [2 * ((labels == i) & (predicted == i)).sum() / max(1, (labels == i).sum() + (predicted == i).sum()) for i in range(1, 8)]
    print(f"{model}: mean Dice {dice:.3f} of the trained hemisphere, {np.mean(scores):.3f} of the other")


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerMedssm", "nnUNetTrainerMedssmNoDeepSupervision"])
@pytest.mark.parametrize("model", OPTIONS)
def test_trainers_of_both_makes_take_a_step(nnunet, model, trainer, capsys):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = nnunet / "preprocessed" / DATASET
    plans = json.loads((folder / f"nnUNetPlans_{model}.json").read_text()) | {"continue_training": False}
    made = recursive_find_trainer_class_by_name(trainer)(plans, CONFIGURATION, "all", json.loads((folder / "dataset.json").read_text()),
                                                         torch.device("cpu"))
    made.initialize()
    patch = made.configuration_manager.patch_size
    labels = torch.randint(8, (1, 1, *patch)).float()
    scales = made._get_deep_supervision_scales()
    assert (scales is None) == trainer.endswith("NoDeepSupervision")
    sizes = [[round(p * s) for p, s in zip(patch, scale, strict=True)] for scale in scales or [[1] * 3]]
    targets = [torch.nn.functional.interpolate(labels, size, mode="nearest") for size in sizes]
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    made.set_deep_supervision_enabled(made.enable_deep_supervision)
    loss = made.train_step({"data": torch.randn(1, 1, *patch), "target": targets if scales else targets[0]})["loss"]
    assert np.isfinite(loss)
    supervised = {name for name, p in made.network.named_parameters() if p.grad is not None}
    assert len(supervised) > 0.9 * len(before) and all(torch.isfinite(made.network.get_parameter(name)).all() for name in supervised)
    assert any(not torch.equal(before[name], made.network.get_parameter(name)) for name in supervised)
    if trainer != "nnUNetTrainer":
        decays = [(group["weight_decay"] > 0, sum(p.numel() for p in group["params"])) for group in made.optimizer.param_groups]
        assert [decay for decay, _ in decays] == [True, False] and sum(n for _, n in decays) == sum(p.numel() for p in made.network.parameters())
    for enabled in (False, True):
        made.set_deep_supervision_enabled(enabled)
        assert isinstance(made.network(torch.randn(1, 1, *patch)), list) == enabled
    capsys.readouterr()  # what nnU-Net says is not what is reported here


def path_of_trainers() -> str:
    """What the command prints, by itself."""
    return subprocess.run([BIN / "medssm", "nnunet", "path"], capture_output=True, text=True, check=True).stdout.strip()


def run(program: str, *arguments, **environment) -> None:
    """Run one of nnU-Net's commands and say how long it took; its output is shown where it fails."""
    started = time.perf_counter()
    done = subprocess.run([BIN / program, *map(str, arguments)], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    print(f"{program} {time.perf_counter() - started:.0f} s")


def write_dataset(folder: Path) -> None:
    """Every third voxel of both hemispheres, the right one to train on."""
    brain = load_brain("icbm2009c")
    for half, section in ((brain.trained, "Tr"), (brain.tested, "Ts")):
        image = brain.image.slicer[half.box].slicer[::STEP, ::STEP, ::STEP]
        labels = brain.labels[half.box][::STEP, ::STEP, ::STEP]
        for kind, data, name in (("images", np.asanyarray(image.dataobj, np.float32), f"{half.side}_0000"), ("labels", labels, half.side)):
            (folder / f"{kind}{section}").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, image.affine), folder / f"{kind}{section}" / f"{name}.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": brain.classes, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
