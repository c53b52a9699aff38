"""nnU-Net itself on a real brain at 3 mm: plan, preprocess, train, validate and predict with rewritten plans, and trainers of both makes.

`make test-integrations` runs it; its name keeps it out of `make test`. One hemisphere is trained on and validated, the other predicted: after an
epoch of some iterations this shows that everything fits together, not how accurate anything is. The five cases, so that nnU-Net can split them, are
the same hemisphere's voxels from five places to start at.
"""

import json
import os
import re
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
TUTORIAL = Path(__file__).parents[3] / "docs/tutorials/nnunet.md"
OPTIONS = {"umamba_enc": ["features=[8,16,32,32]"], "ultralight_vmunet": []}  # with heads at several levels, and with one
STARTS = ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1), (2, 2, 2))


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    """The folder of a data set that nnU-Net planned and preprocessed, with plans for each model; nnU-Net's environment is set."""
    folder = tmp_path_factory.mktemp("nnunet")
    environment = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    environment |= {
        "nnUNet_extTrainer": path_of_trainers(),
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SHIM), os.environ.get("PYTHONPATH")))),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        write_dataset(folder / "raw" / DATASET)
        run(
            "nnUNetv2_plan_and_preprocess",
            "-d",
            501,
            "-c",
            CONFIGURATION,
            "-np",
            1,
            "-npfp",
            1,
            "--verify_dataset_integrity",
            "--no_pbar",
            nnUNet_n_proc_DA="1",
        )
        plans = folder / "preprocessed" / DATASET / "nnUNetPlans.json"
        for model, options in OPTIONS.items():
            assert cli.main(["nnunet", "plans", str(plans), "--model", model, "--configuration", CONFIGURATION, "--quiet", *options]) == 0
        yield folder


def test_the_tutorials_commands(nnunet, monkeypatch):
    """As they stand there, but for the installation and with a short epoch on the CPU."""
    block = "".join(b for b in re.findall(r"```bash\n(.*?)```", TUTORIAL.read_text(), re.DOTALL) if not b.startswith("pip install"))
    assert "nnUNetTrainerMedssm " in block
    (nnunet / "scans").symlink_to(nnunet / "raw" / DATASET / "imagesTs")
    monkeypatch.delenv("nnUNet_extTrainer")
    monkeypatch.setenv("PATH", os.pathsep.join((str(BIN), os.environ["PATH"])))
    block = re.sub(r"\bnnUNetTrainerMedssm\b", "nnUNetTrainerMedssmShort", block)
    run("bash", "-e", "-c", re.sub(r"^nnUNetv2_.*", r"\g<0> -device cpu", block, flags=re.MULTILINE), cwd=nnunet)
    report("umamba_bot", nnunet, "fold_0", nnunet / "labels")


def test_train_validate_and_predict(nnunet):
    model = "ultralight_vmunet"
    settings = ("-tr", "nnUNetTrainerMedssmShort", "-p", f"nnUNetPlans_{model}", "-device", "cpu")
    run("nnUNetv2_train", 501, CONFIGURATION, "all", *settings)
    run(
        "nnUNetv2_predict",
        "-i",
        nnunet / "raw" / DATASET / "imagesTs",
        "-o",
        nnunet / model,
        "-d",
        501,
        "-c",
        CONFIGURATION,
        "-f",
        "all",
        *settings,
        "--disable_tta",
        "-npp",
        1,
        "-nps",
        1,
    )
    report(model, nnunet, "fold_all", nnunet / model)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerMedssm", "nnUNetTrainerMedssmNoDeepSupervision"])
@pytest.mark.parametrize("model", OPTIONS)
def test_trainers_of_both_makes_take_a_step(nnunet, model, trainer, capsys):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = nnunet / "preprocessed" / DATASET
    plans = json.loads((folder / f"nnUNetPlans_{model}.json").read_text()) | {"continue_training": False}
    made = recursive_find_trainer_class_by_name(trainer)(
        plans, CONFIGURATION, "all", json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
    )
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


def run(program: str, *arguments, cwd: Path | None = None, **environment) -> None:
    """Run one of nnU-Net's commands and say how long it took; its output is shown where it fails."""
    started = time.perf_counter()
    where = program if program == "bash" else BIN / program
    done = subprocess.run(
        [where, *map(str, arguments)], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stdout[-5000:]
    print(f"{program} {time.perf_counter() - started:.0f} s")


def report(model: str, nnunet: Path, fold: str, labels: Path) -> None:
    """Check what nnU-Net wrote of the trained hemisphere and of the other, and print both mean Dices."""
    trained = nnunet / "results" / DATASET / f"nnUNetTrainerMedssmShort__nnUNetPlans_{model}__{CONFIGURATION}" / fold
    dice = json.loads((trained / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
    raw = nnunet / "raw" / DATASET
    found, image = nib.load(labels / "left.nii.gz"), nib.load(raw / "imagesTs" / "left_0000.nii.gz")
    assert found.shape == image.shape and np.allclose(found.affine, image.affine, atol=1e-4)
    predicted, truth = np.asanyarray(found.dataobj), np.asanyarray(nib.load(raw / "labelsTs" / "left.nii.gz").dataobj)
    assert set(np.unique(predicted)) <= set(range(8)) and 0 <= dice <= 1
    scores = [2 * ((truth == i) & (predicted == i)).sum() / max(1, (truth == i).sum() + (predicted == i).sum()) for i in range(1, 8)]
    print(f"{model}: mean Dice {dice:.3f} of the trained hemisphere, {np.mean(scores):.3f} of the other")


def write_dataset(folder: Path) -> None:
    """Every third voxel of both hemispheres, the right one to train on."""
    brain = load_brain("icbm2009c")
    for half, section, starts in ((brain.trained, "Tr", STARTS), (brain.tested, "Ts", STARTS[:1])):
        for number, start in enumerate(starts):
            grid = tuple(slice(first, None, STEP) for first in start)
            image = brain.image.slicer[half.box].slicer[grid]
            name = half.side if section == "Ts" else f"{half.side}{number}"
            voxels, labels = np.asanyarray(image.dataobj, np.float32), brain.labels[half.box][grid]
            for kind, data, file in (("images", voxels, f"{name}_0000"), ("labels", labels, name)):
                (folder / f"{kind}{section}").mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(data, image.affine), folder / f"{kind}{section}" / f"{file}.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": brain.classes, "numTraining": len(STARTS), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
