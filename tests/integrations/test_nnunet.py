"""nnU-Net's plans of both generations rewritten, and networks under its contract, without nnU-Net (tests/integrations/nnunet has the real one)."""

import copy
import json
import pydoc
import re
from pathlib import Path

import pytest
import torch

from medssm import cli
from medssm.errors import UserError
from medssm.integrations.nnunet import Network, rewrite
from tests.models.test_models import CLASSIFIERS, SINGLE, SMALL

FILES = Path(__file__).with_name("nnunet")
GENERATIONS = ("new", "old")
OPTIONS = {**SMALL, **SINGLE, "umamba_bot": {}, "umamba_enc": {}, "medssm_unet": {}}  # {}: the plans' lists
OLD_KEYS = {
    "UNet_class_name",
    "UNet_base_num_features",
    "unet_max_num_features",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "num_pool_per_axis",
    "pool_op_kernel_sizes",
    "conv_kernel_sizes",
}


def plans(generation="new"):
    return FILES / f"plans_{generation}.json"


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """model, configurations, generation and options -> the new plans and what rewrite says of them; each is written once."""
    folder, done = tmp_path_factory.mktemp("plans"), {}

    def write(model, *configurations, generation="new", **options):
        key = json.dumps((model, configurations, generation, options))
        if key not in done:
            told = rewrite(
                plans(generation),
                model,
                folder / f"{len(done)}.json",
                configurations=configurations,
                name="new",
                options=options or OPTIONS.get(model),
            )
            done[key] = json.loads(Path(told["plans"]).read_text()), told
        return copy.deepcopy(done[key])

    return write


def built(configuration, deep_supervision, input_channels=1, num_classes=3):
    """The network as nnU-Net builds it from a configuration."""
    architecture = configuration["architecture"]
    network_class = pydoc.locate(architecture["network_class_name"])
    assert architecture["_kw_requires_import"] == []
    torch.manual_seed(0)
    return network_class(input_channels=input_channels, num_classes=num_classes, **architecture["arch_kwargs"], deep_supervision=deep_supervision)


def label_sizes(configuration):
    """The resolutions of nnU-Net's labels: the patch over the strides multiplied up, rounded, the last left out."""
    sizes, step = [], [1] * len(configuration["patch_size"])
    for stride in configuration["architecture"]["arch_kwargs"]["strides"]:
        step = [a * b for a, b in zip(step, stride, strict=True)]
        sizes.append(tuple(round(p * (1 / s)) for p, s in zip(configuration["patch_size"], step, strict=True)))
    return sizes[:-1]


@pytest.mark.each_network
@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
@pytest.mark.parametrize("model", OPTIONS)
def test_outputs_are_nnunets_labels_with_deep_supervision_and_one_tensor_without(model, name, rewritten):
    configuration = rewritten(model, name)[0]["configurations"][name]
    network = built(configuration, deep_supervision=True)
    x = torch.randn(2, 1, *configuration["patch_size"])
    outputs, sizes = network(x), label_sizes(configuration)
    assert isinstance(outputs, list) and [tuple(y.shape) for y in outputs] == [(2, 3, *size) for size in sizes]
    assert sizes[0] == tuple(configuration["patch_size"]) and len(sizes) > 1
    network.eval()
    with torch.no_grad():
        finest = network(x)[0]
        network.decoder.deep_supervision = False  # nnU-Net's trainer does so before it predicts
        assert torch.equal(network(x), finest)
    network.decoder.deep_supervision = True
    assert len(network(x)) == len(sizes)


@pytest.mark.each_network
@pytest.mark.parametrize("model", OPTIONS)
def test_weights_of_training_load_for_prediction(model, rewritten):
    configuration = rewritten(model, "3d_fullres")[0]["configurations"]["3d_fullres"]
    trained, predicting = built(configuration, deep_supervision=True).eval(), built(configuration, deep_supervision=False).eval()
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.01)
        predicting.load_state_dict(trained.state_dict())
        x = torch.randn(1, 1, *configuration["patch_size"])
        assert torch.equal(predicting(x), trained(x)[0])


@pytest.mark.parametrize("model", OPTIONS)
def test_every_parameter_learns_from_nnunets_loss(model, rewritten):
    configuration = rewritten(model, "3d_fullres")[0]["configurations"]["3d_fullres"]
    network = built(configuration, deep_supervision=True)
    outputs = network(torch.randn(2, 1, *configuration["patch_size"]))
    weights = [0.5**i for i in range(len(outputs))]
    sum(w * y.square().mean() for w, y in zip(weights, outputs, strict=True)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("model", ["umamba_bot", "umamba_enc", "medssm_unet"])
def test_networks_with_free_stages_take_features_anisotropic_strides_and_kernels(model, generation, rewritten):
    new, told = rewritten(model, "3d_fullres", generation=generation)
    configuration = new["configurations"]["3d_fullres"]
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    assert configuration["architecture"]["arch_kwargs"]["strides"] == strides
    network = built(configuration, deep_supervision=True)
    assert [list(s) for s in network.encoder.strides] == strides
    outputs = network(torch.randn(1, 1, 10, 32, 24))
    assert [tuple(y.shape[2:]) for y in outputs] == [(10, 32, 24), (10, 16, 12), (5, 8, 6)]
    assert told["configurations"]["3d_fullres"]["outputs"] == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    if model != "medssm_unet":
        assert network.encoder.output_channels == [4, 8, 16, 16]
        assert network.encoder.stem[0].conv1.kernel_size == (1, 3, 3) and network.encoder.stages[1][0].conv1.kernel_size == (3, 3, 3)


@pytest.mark.parametrize("model", ["umamba_bot", "segmamba"])
def test_both_generations_give_the_same_network_and_keep_the_rest(model, rewritten):
    new, old = (rewritten(model, generation=generation)[0] for generation in GENERATIONS)
    assert new == old
    before = json.loads(plans().read_text())
    assert new["plans_name"] == "new" and before.pop("plans_name") and new.pop("plans_name")
    for name, configuration in new.pop("configurations").items():
        was = before["configurations"][name]
        own = configuration.pop("architecture", None)
        was.pop("architecture", None)
        assert configuration == was and (own is None) == (name == "3d_fullres_bs4") and not OLD_KEYS & set(configuration)
    assert new == {key: value for key, value in before.items() if key != "configurations"}


def test_residual_plans_give_their_blocks(tmp_path):
    content = json.loads(plans().read_text())
    own = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    own["n_blocks_per_stage"] = [1, 2, 3, 1]
    del own["n_conv_per_stage"]
    (tmp_path / "residual.json").write_text(json.dumps(content))
    rewrite(tmp_path / "residual.json", "umamba_enc", tmp_path / "new.json", configurations=["3d_fullres"])
    network = built(json.loads((tmp_path / "new.json").read_text())["configurations"]["3d_fullres"], True)
    assert [len(stage) for stage in network.encoder.stages] == [1, 2, 3, 1]


def test_configurations_inherit(rewritten):
    new, told = rewritten("umamba_bot")
    assert list(told["configurations"]) == ["2d", "3d_fullres", "3d_small"]  # 3d_fullres_bs4 inherits its network
    assert new["configurations"]["3d_small"]["patch_size"] == [8, 16, 16]
    assert told["configurations"]["3d_small"]["outputs"] == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]


@pytest.mark.parametrize("model, outputs", [("segmamba", [1, 2]), ("swin_umamba", [1, 2]), ("lightm_unet", [1, 2]), ("swin_umamba_d", [1])])
def test_levels_that_do_not_divide_the_patch_are_not_supervised(model, outputs, rewritten):
    new, told = rewritten(model, "3d_fullres")  # the patch's 10 voxels halve once
    assert told["configurations"]["3d_fullres"]["outputs"] == [(n,) * 3 for n in outputs]
    outputs = built(new["configurations"]["3d_fullres"], True)(torch.randn(1, 1, 10, 32, 24))
    assert [tuple(y.shape[2:]) for y in outputs] == label_sizes(new["configurations"]["3d_fullres"])


@pytest.mark.parametrize("model", SINGLE)
def test_a_network_with_one_head_has_the_loss_of_its_full_resolution(model, rewritten):
    new, told = rewritten(model, "3d_fullres")
    configuration = new["configurations"]["3d_fullres"]
    assert told["configurations"]["3d_fullres"]["outputs"] == [(1, 1, 1)]
    network, x = built(configuration, True), torch.randn(2, 1, *configuration["patch_size"])
    network.eval()
    labels = [torch.randn(2, 3, *size) for size in label_sizes(configuration)[:1]] * 2  # at full resolution nnU-Net hands out one label twice
    outputs = network(x)
    for last in (0.0, 1e-6, 0.5):  # nnU-Net's weights of two outputs: the last counts nothing, next to nothing under DDP
        weights = [1 / (1 + last), last / (1 + last)]
        loss = sum(w * (y - t).square().mean() for w, y, t in zip(weights, outputs, labels, strict=True))
        torch.testing.assert_close(loss, (outputs[0] - labels[0]).square().mean())


def test_options_win_over_the_plans(tmp_path, rewritten):
    new, _ = rewritten("umamba_bot", "3d_fullres", features=[6, 12, 18], blocks=1)
    network = built(new["configurations"]["3d_fullres"], True)
    assert network.encoder.output_channels == [6, 12, 18] and network.encoder.strides == [(1, 1, 1), (1, 2, 2), (2, 2, 2)]
    rewrite(
        plans(),
        "medssm_unet",
        tmp_path / "tiny.json",
        configurations=["3d_fullres"],
        options={"size": "tiny", "strides": [1, [1, 2, 2], 2, [1, 2, 2], 1]},
    )
    network = built(json.loads((tmp_path / "tiny.json").read_text())["configurations"]["3d_fullres"], True)
    assert network.encoder.strides[1] == (1, 2, 2) and len(network(torch.randn(1, 1, 10, 32, 24))) == 4


@pytest.mark.parametrize("model", ["monai_dynunet", "monai_unetr", "monai_segresnet"])
def test_monais_networks(model, tmp_path):
    pytest.importorskip("monai")
    small = {"monai_unetr": {"hidden_size": 12, "mlp_dim": 12, "num_heads": 2}}.get(model, {})
    configuration = "3d_small" if model != "monai_unetr" else "2d"
    content = json.loads(plans().read_text())
    content["configurations"]["2d"]["patch_size"] = [32, 48]
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(content))
    rewrite(tmp_path / "nnUNetPlans.json", model, configurations=[configuration], options=small)
    new = json.loads((tmp_path / f"nnUNetPlans_{model}.json").read_text())
    entry = new["configurations"][configuration]
    network, x = built(entry, False), torch.randn(1, 1, *entry["patch_size"])
    assert network(x).shape == (1, 3, *entry["patch_size"])
    network.decoder.deep_supervision = True
    assert [y.shape for y in network(x)] == [(1, 3, *entry["patch_size"])] * 2


@pytest.mark.parametrize("model", CLASSIFIERS)
def test_classifiers_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="expected one that segments"):
        rewrite(plans(), model, tmp_path / "new.json", configurations=["2d"], options=CLASSIFIERS[model])
    assert not list(tmp_path.iterdir())


def test_a_patch_that_a_network_cannot_take_is_refused(tmp_path, caplog):
    pytest.importorskip("monai")
    source = tmp_path / "nnUNetPlans.json"
    source.write_text(plans().read_text().replace("[10, 32, 24]", "[20, 32, 24]"))
    with pytest.raises(UserError, match=r"3d_fullres: model: monai_unetr does not take patches of \[20, 32, 24\]"):
        rewrite(source, "monai_unetr", configurations=["3d_fullres"])
    assert not caplog.records and list(tmp_path.iterdir()) == [source]


def test_strides_that_are_not_the_outputs_are_refused():
    with pytest.raises(ValueError, match=r"strides: expected segmamba's outputs.*got \[\(1, 1, 1\), \(1, 2, 2\)\]"):
        Network(1, 2, model="segmamba", spatial_dims=3, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], options=SMALL["segmamba"])
    with pytest.raises(ValueError, match="deep_supervision: expected one of vmunet's options"):
        Network(1, 2, model="vmunet", spatial_dims=2, strides=[[1, 1], [2, 2], [2, 2]], options=SINGLE["vmunet"])
    with pytest.raises(ValueError, match="strides: expected two or more entries of 3 steps"):
        Network(1, 2, model="segmamba", spatial_dims=3, strides=[[1, 1, 1]])


def command(capsys, *arguments):
    status = cli.main(["nnunet", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_command_takes_options_anywhere_and_names_the_file_as_nnunet_looks_for_it(tmp_path, capsys):
    source = tmp_path / "nnUNetPlans.json"
    source.write_bytes(plans().read_bytes())
    arguments = ["blocks=1", "--model", "umamba_bot", "--configuration", "3d_fullres", "features=[4, 8]", "--json"]
    status, shown, _ = command(capsys, "plans", source, *arguments)
    told = json.loads(shown)
    assert status == 0 and told["plans"] == str(tmp_path / "nnUNetPlans_umamba_bot.json") and list(told["configurations"]) == ["3d_fullres"]
    new = json.loads(Path(told["plans"]).read_text())
    assert new["plans_name"] == told["name"] == "nnUNetPlans_umamba_bot"
    assert new["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["options"]["features"] == [4, 8]
    assert "architecture" in new["configurations"]["2d"] and new["configurations"]["2d"] == json.loads(source.read_text())["configurations"]["2d"]
    status, shown, _ = command(capsys, "plans", source, "--model", "umamba_enc", "--name", "mine")
    assert status == 0 and (tmp_path / "mine.json").is_file() and "nnUNetv2_train Dataset007_Prostate 2d 0 -p mine" in shown
    assert command(capsys, "plans", source, "--model", "umamba_enc", "--name", "mine", "--overwrite", "--quiet") == (0, "", "")


def test_path_prints_a_folder_of_nothing_but_trainers(capsys):
    status, shown, _ = command(capsys, "path")
    folder = Path(shown.strip())
    assert status == 0 and [file.name for file in sorted(folder.glob("*.py"))] == ["__init__.py", "medssm_trainers.py"]
    trainers = json.loads(command(capsys, "path", "--json")[1])["trainers"]
    assert trainers == ["nnUNetTrainerMedssm", "nnUNetTrainerMedssmNoDeepSupervision", "nnUNetTrainerMedssmShort"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "unet"], r"model: expected one of .*umamba_bot.*, got 'unet'"),
        (["--model", "umamba_bot", "--configuration", "3d_lowres"], "configuration: expected one of 2d, 3d_fullres, .*, got '3d_lowres'"),
        (["--model", "umamba_bot", "width=3"], "width: expected one of umamba_bot's options"),
        (["--model", "umamba_bot", "deep_supervision=true"], "deep_supervision: expected an option of the model, got one that nnU-Net sets"),
        (["--model", "umamba_bot", "features"], "options: expected key=value, got 'features'"),
        (["--model", "umamba_bot", "features=[4,8,8,8,8]"], "strides: expected 5 entries"),
        (["--model", "umamba_bot", "features=wide"], "features: expected a list with one entry per stage, got 'wide'"),
        (["--model", "umamba_bot", "features=[4,-8,16]", "--configuration", "2d"], r"2d: umamba_bot does not take the options .*-8"),
        (["--model", "umamba_bot", "blocks=two", "--configuration", "2d"], "2d: umamba_bot does not take the options .*two"),
        (["--model", "umamba_bot", "--name", "a__b"], "name: expected letters.*got 'a__b'"),
        (["--model", "umamba_bot", "--out", plans(), "--overwrite"], "expected a new file, got one that exists"),
        (["--model", "umamba_bot", "--out", plans("old")], "expected a new file, got one that exists .--overwrite"),
        ([], r"--model: expected a value on the command line or in a file \(--config\), got none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = [file.read_bytes() for file in sorted(FILES.glob("*.json"))]
    status, _, error = command(capsys, "plans", plans(), *arguments)
    assert status == 2 and len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert before == [file.read_bytes() for file in sorted(FILES.glob("*.json"))]


@pytest.mark.parametrize(
    "text, message",
    [
        (plans().read_text()[:300], "not JSON"),
        ("[1, 2]", "expected nnU-Net's plans"),
        ('{"plans_name": "a", "configurations": []}', "expected nnU-Net's plans"),
        ('{"plans_name": "a", "configurations": {"2d": 5}}', "expected nnU-Net's plans"),
        ('{"plans_name": "a", "configurations": {}}', "expected a configuration with a network of its own, got none"),
        ('{"plans_name": "a", "configurations": {"2d": {"patch_size": [8, 8], "batch_size": 2}}}', "2d: expected the lists of nnU-Net's U-Net"),
        ('{"plans_name": "a", "configurations": {"2d": {"inherits_from": "3d", "patch_size": [8, 8]}}}', "2d: expected to inherit from another"),
        (plans().read_text().replace("[36, 32]", "[36, 32, 32]"), "2d: expected one entry of each list per stage and per axis"),
        (
            plans().read_text().replace('"dynamic_network_architectures.architectures.unet.PlainConvUNet"', '"medssm.integrations.nnunet.Network"'),
            "start from the plans that nnU-Net wrote",
        ),
        (None, "No such file"),
    ],
)
def test_bad_plans_are_one_line(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "plans.json").write_text(text)
    status, _, error = command(capsys, "plans", tmp_path / "plans.json", "--model", "umamba_bot")
    assert status == 2 and len(error.splitlines()) == 1 and message in error, error
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"] * (text is not None)


def test_plans_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medssm.files.os.replace", full)
    with pytest.raises(UserError, match="disk is full"):
        rewrite(plans(), "umamba_bot", tmp_path / "new.json", configurations=["2d"])
    assert not list(tmp_path.iterdir())
