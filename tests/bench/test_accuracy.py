"""medssm bench accuracy: every network on every fold with every seed, what is kept, and going on after a stop."""

import json
import sys

import numpy as np
import pytest

from medssm import cli
from medssm.bench.accuracy import SPLITS, accuracy, nnunet, runs, specs, summary
from medssm.errors import UserError
from medssm.segment.evaluate import evaluate
from medssm.segment.loop import Loop
from tests.segment.synthetic import nnunet_folder

TINY, UNET = "medssm_unet:features=[4,6],depths=[0,1],decoder_depths=[1],scans_from=1", "monai_basicunet"
SIZED = ("monai_basicunet", "monai_dynunet", "monai_segresnet", "umamba_bot", "umamba_enc", "segmamba", "lightm_unet")
EQUAL = "medssm_unet:features=[4,6],depths=[0,1],decoder_depths=[1]"
FEW = {"folds": 2, "steps": 3, "recipe": {"patch": [16, 16, 16]}, "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return nnunet_folder(tmp_path_factory.mktemp("data"), cases=6, shape=(20, 18, 16))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The folder of a comparison of two networks with two seeds, and its result."""
    out = tmp_path_factory.mktemp("accuracy")
    return out, accuracy(data, models=[TINY, UNET], out=out, seeds=2, equal_to=EQUAL, **FEW)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Only `done`, which is made before, has the page: it takes the longest."""
    monkeypatch.setattr(summary, "_page", lambda *_: None)


def test_every_network_has_every_fold_and_seed(data, done):
    out, result = done
    assert result["failed"] == {} and result["left"] == [] and result["compared"] == {"folds": [0, 1], "seeds": [0, 1]}
    splits = json.loads((out / SPLITS).read_text())
    assert sorted(case for fold in splits for case in fold["val"]) == [f"case_{i}" for i in range(6)]
    for name in (TINY, UNET):
        assert result["networks"][name]["runs"] == 4 and result["networks"][name]["samples"] == 6
        folder = specs.parse([name])[0].folder
        for seed in range(2):
            assert sorted(file.name for file in (out / "predictions" / folder / f"seed_{seed}").glob("*.nii.gz")) == [
                f"case_{i}.nii.gz" for i in range(6)
            ]
            own = [json.loads((out / "runs" / folder / f"fold_{fold}-seed_{seed}.json").read_text()) for fold in range(2)]
            assert [run["fold"] for run in own] == [0, 1] and all(
                run["seed"] == seed and run["steps"] == 3 and run["patch"] == [16] * 3 for run in own
            )
            assert set(own[0]["cases"]) == set(splits[0]["val"])
            wanted = evaluate(out / "predictions" / folder / f"seed_{seed}", data / "labelsTr", classes=data, quiet=True)
            for case, classes in {**own[0]["cases"], **own[1]["cases"]}.items():
                for label, row in classes.items():
                    assert {metric: row[metric] for metric in ("dice", "hd95", "nsd")} == wanted["cases"][case][label]
    sides = result["comparison"]["sides"]
    by_hand = np.mean([runs.mean_dice(json.loads(file.read_text())) for file in (out / "runs" / specs.parse([UNET])[0].folder).glob("*.json")])
    assert sides[UNET]["mean"]["dice"]["mean"] == pytest.approx(by_hand) and sides[UNET]["mean"]["dice"]["n"] == 6
    assert '<img alt="case_' in (out / "compare.html").read_text()
    assert set(result["comparison"]["differences"]) == {UNET} and (out / summary.TABLE).read_text().startswith("# Accuracy on ")


def test_networks_without_options_get_equal_multiply_adds(done):
    networks = done[1]["networks"]
    assert networks[UNET]["options"]["features"][0] >= 1
    wanted = specs.cost(specs.strided(specs.parse([EQUAL])[0], (1, 1, 16, 16, 16), (1, 1, 1)), (1, 1, 16, 16, 16), 3)
    assert networks[UNET]["multiply_adds"] == pytest.approx(wanted, rel=0.3)  # a channel more or less is much here
    own = {"features": [4, 6], "depths": [0, 1], "decoder_depths": [1], "scans_from": 1}
    assert networks[TINY]["options"] == {**own, "strides": [[1, 1, 1], [2, 2, 2]]}  # what train would choose


@pytest.mark.parametrize("name", [UNET, *(pytest.param(name, marks=pytest.mark.thorough) for name in SIZED if name != UNET)])
def test_baselines_can_have_the_multiply_adds_of_medssm_unet(name):
    shape = (1, 1, 48, 64, 48)
    wanted = specs.cost(specs.strided(specs.parse(["medssm_unet"])[0], shape, (1, 1, 1)), shape, 3)
    net = specs.sized(specs.parse([name])[0], wanted, shape, (1, 1, 1), 3)
    assert specs.cost(net, shape, 3) == pytest.approx(wanted, rel=0.06)


def test_what_is_done_is_not_done_again(data, done, monkeypatch):
    monkeypatch.setattr(runs, "train", None)
    again = accuracy(data, models=[TINY, UNET], out=done[0], seeds=2, equal_to=EQUAL, **FEW)
    assert again["comparison"] == done[1]["comparison"]


def test_the_tables_go_into_a_page(data, done, tmp_path):
    page, table = tmp_path / "page.md", (done[0] / summary.TABLE).read_text()
    page.write_text(f"# Mine\n{summary.BEGIN}\nold\n{summary.END}\nthe rest\n")
    for _ in range(2):
        accuracy(data, models=[TINY, UNET], out=done[0], seeds=2, equal_to=EQUAL, docs=page, **FEW)
        assert page.read_text() == f"# Mine\n{summary.BEGIN}\n{table.split(chr(10), 2)[2]}{summary.END}\nthe rest\n"
    page.write_text("# Mine\n")
    with pytest.raises(UserError, match=r"docs: .*page.md: expected the lines <!-- begin: medssm bench accuracy --> and <!-- end -->"):
        accuracy(data, models=[TINY], out=tmp_path, docs=page, **FEW)


def test_a_stopped_comparison_goes_on_and_gives_the_same(data, done, tmp_path, monkeypatch):
    step, steps = Loop._step, []

    def stopping(loop, batch):
        steps.append(step(loop, batch))
        if len(steps) == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return steps[-1]

    monkeypatch.setattr(Loop, "_step", stopping)
    with pytest.raises(KeyboardInterrupt, match=r"fold 0, seed 0: stopped and saved; the same command goes on from here"):
        accuracy(data, models=[TINY], out=tmp_path, equal_to=EQUAL, **FEW)
    assert not list((tmp_path / "runs").glob("*/*.json"))
    monkeypatch.undo()
    monkeypatch.setattr(Loop, "_step", lambda loop, batch: steps.append(0) or step(loop, batch))
    accuracy(data, models=[TINY], out=tmp_path, equal_to=EQUAL, **FEW)
    assert len(steps) == 2 + 1 + 3  # two before the stop, the third, and the other fold's
    name = f"runs/{specs.parse([TINY])[0].folder}/fold_0-seed_0.json"
    assert json.loads((tmp_path / name).read_text())["cases"] == json.loads((done[0] / name).read_text())["cases"]


def test_a_network_that_fails_does_not_stop_the_others(data, tmp_path, monkeypatch):
    train = runs.train

    def failing(*args, **options):
        if options["model"] == UNET:
            raise UserError("training: the loss is nan at step 2")
        return train(*args, **options)

    monkeypatch.setattr(runs, "train", failing)
    result = accuracy(data, models=[UNET, TINY], out=tmp_path, equal_to=EQUAL, **FEW)
    assert set(result["failed"]) == {f"{UNET}, fold {fold}, seed 0" for fold in range(2)} and list(result["networks"]) == [TINY]
    assert "nan" in next(iter(result["failed"].values())) and result["baseline"] == TINY


def test_committed_folds_are_read(data, tmp_path):
    splits = [{"train": ["case_0", "case_1", "case_2"], "val": ["case_5"]}, {"train": ["case_3", "case_4", "case_5"], "val": ["case_0"]}]
    (tmp_path / "mine.json").write_text(json.dumps(splits))
    out = tmp_path / "out"
    result = accuracy(data, models=[TINY], out=out, splits=tmp_path / "mine.json", equal_to="none", **FEW)
    assert json.loads((out / SPLITS).read_text()) == splits
    assert result["comparison"]["sides"][TINY]["mean"]["dice"]["n"] == 2
    with pytest.raises(UserError, match=r"folds: .*splits.json has 2 folds, expected 3"):
        accuracy(data, models=[TINY], out=out, equal_to="none", **{**FEW, "folds": 3})
    with pytest.raises(UserError, match=r"out: .* has trainings with steps 3, now 4: name another folder"):
        accuracy(data, models=[TINY], out=out, equal_to="none", **{**FEW, "steps": 4})
    splits[1]["val"] = ["case_5"]
    splits[1]["train"] = ["case_3"]
    (tmp_path / "mine.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=r"fold 1 holds out case_5, which an earlier fold does too"):
        accuracy(data, models=[TINY], out=tmp_path / "other", splits=tmp_path / "mine.json", **FEW)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"models": ["medssm_unat"]}, r"models: expected one of .*medssm_unet.*, got 'medssm_unat'"),
        ({"models": ["medssm_unet:mixer"]}, r"models: medssm_unet:mixer: expected NAME:option=value,option=value, got 'mixer'"),
        ({"models": ["medssm_unet", "medssm_unet"]}, r"models: expected different networks, got medssm_unet twice"),
        ({"models": ["medssm_unet:mixer=best"]}, r"mixer: expected one of ss_nd"),
        ({"models": ["medssm_unet"], "baseline": "unet"}, r"baseline: expected one of medssm_unet, got 'unet'"),
        ({"models": ["medssm_unet"], "folds": 1}, r"folds: expected 2 or more, got 1"),
        ({"models": ["medssm_unet"], "seeds": 0}, r"seeds: expected 1 or more, got 0"),
        ({"models": ["medssm_unet"], "recipe": {"learning_rate": 1}}, r"recipe: expected options of medssm train \(.*lr.*\), got 'learning_rate'"),
        ({"models": ["medssm_unet"], "recipe": {"seed": 1}}, r"recipe: expected options of medssm train"),
        ({"models": ["nnunet:plan=a"]}, r"models: nnunet: expected plans=FILE or configuration=NAME, got plan"),
    ],
)
def test_bad_input_gets_one_line(data, tmp_path, options, line):
    with pytest.raises(UserError, match=line):
        accuracy(data, out=tmp_path, **{**FEW, **options})


def test_options_of_a_network_may_hold_lists():
    net = specs.parse(["medssm_unet:features=[4,8],mixer=gla,expand=1,strides=[[1,1,1],[2,2,2]]"])[0]
    assert net.options == {"features": [4, 8], "mixer": "gla", "expand": 1, "strides": [[1, 1, 1], [2, 2, 2]]}
    assert net.folder == "medssm_unet_features_4_8_mixer_gla_expand_1_strides_1_1_1_2_2_2"


def test_without_nnunet_there_is_one_clear_line(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    with pytest.raises(UserError, match=r"models: nnunet needs nnU-Net: pip install '.\[nnunet\]'"):
        accuracy(data, models=["nnunet"], out=tmp_path, **FEW)


def test_nnunets_own_network_by_its_plans(data, tmp_path):
    pytest.importorskip("dynamic_network_architectures")
    unet = {"n_stages": 2, "features_per_stage": [4, 8], "strides": [[1] * 3, [2] * 3], "kernel_sizes": [[3] * 3] * 2}
    unet |= {"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1]}
    architecture = {"network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet", "arch_kwargs": unet}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {"patch_size": [16] * 3, "batch_size": 2, "architecture": architecture}}}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    result = accuracy(data, models=[f"nnunet:plans={tmp_path / 'plans.json'}"], out=tmp_path / "out", **FEW)
    ours = next(iter(result["networks"].values()))
    assert ours["options"]["features"] == [4, 8] and ours["runs"] == 2 and result["failed"] == {}
    with pytest.raises(UserError, match=r"plans.json: expected the configuration 2d, got 3d_fullres"):
        nnunet.options(data, tmp_path, 2, {"plans": str(tmp_path / "plans.json")})


def test_the_command(data, tmp_path, capsys):
    words = ["bench", "accuracy", str(data), "--models", TINY, "--out", str(tmp_path / "out"), "--folds", "2", "--steps", "2", "--device", "cpu"]
    (tmp_path / "recipe.yaml").write_text("recipe: {patch: [16, 16, 16], lr: 0.002}\nequal_to: none\n")
    assert cli.main([*words, "--config", str(tmp_path / "recipe.yaml"), "--quiet", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["recipe"] == {"lr": 0.002} and printed["settings"]["patch"] == [16, 16, 16]
    assert cli.main(["bench", "accurate"]) == 2 and "expected one of accuracy, got 'accurate', did you mean accuracy?" in capsys.readouterr().err
