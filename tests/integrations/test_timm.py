"""timm: create_model, classifiers, feature pyramids. Needs a timm that can be imported (it imports torchvision)."""

import copy

import pytest
import torch

import medssm
from medssm.models import registry
from tests.models.test_models import ALL, CLASSIFIERS

try:
    import timm

    from medssm.integrations import timm as integration
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

# Not the 4 channels of other tests: the backward of torch 2.13 for a 1 x 1 convolution with stride 2 on few channels-last channels crashes on a CPU.
ALL = ALL | {name: {"features": (16, 16, 32)} for name in ("umamba_bot", "umamba_enc")}
STACKS = ["vim", "vrwkv"]
SIZED = {"medssm_unet": "tiny", "medmamba": "tiny", "vim": "tiny", "vmamba": "tiny", "mlla": "tiny", "vrwkv": "tiny"}


@pytest.fixture(scope="module", autouse=True)
def names():
    return integration.register()


def build(model, **options):
    torch.manual_seed(0)
    name = "medssm_" + model.removeprefix("medssm_") + (f"_{SIZED[model]}" if model in SIZED else "")
    return timm.create_model(name, **{"in_chans": 2, **{k: v for k, v in ALL[model].items() if k != "size"}, **options})


def without_gradient(model):
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_register_enters_the_models_and_may_be_called_again(names, recwarn):
    assert {"medssm_vmamba_tiny", "medssm_medmamba_base", "medssm_vim_small", "medssm_unet_tiny", "medssm_umamba_enc"} <= set(names)
    assert set(names) <= set(timm.list_models("medssm_*")) and integration.register() == names
    assert not [w for w in recwarn if "registry" in str(w.message)]


@pytest.mark.parametrize(
    "name, pool, first",
    [
        ("vmamba_tiny", 7, "encoder.stem.0"),
        ("vim_tiny", 14, "encoder.stem"),
        ("unet_tiny", 14, "encoder.stages.1.0"),
        ("lightm_unet", 28, "encoder.stem.0.1"),
        ("umamba_bot", 7, ("encoder.stem.0.conv1", "encoder.stem.0.conv3")),
    ],
)
def test_timm_knows_the_layers_at_both_ends(name, pool, first):
    config = timm.get_pretrained_cfg(f"medssm_{name}")
    assert (config.pool_size, config.first_conv, config.classifier) == ((pool, pool), first, "head")
    model = timm.create_model(f"medssm_{name}", num_classes=0).eval()
    with torch.no_grad():
        length = model.forward_features(torch.randn(1, 3, 224, 224)).shape[1:]
    assert length == ((197, 192) if name == "vim_tiny" else (model.num_features, pool, pool))


def test_models_without_an_encoder_are_left_out():
    medssm.register_model("bare_convolution", lambda *, spatial_dims, in_channels, out_channels: torch.nn.Conv2d(in_channels, out_channels, 1))
    try:
        assert "medssm_bare_convolution" not in integration.register()
    finally:
        del registry._models["bare_convolution"]


@pytest.mark.parametrize("name", ALL)
def test_every_encoder_classifies_and_learns(name):
    model = build(name, num_classes=5)
    x = torch.randn(2, 2, 64, 64)
    logits = model(x)
    assert logits.shape == (2, 5) and model.num_classes == 5 and model.get_classifier().out_features == 5
    logits.square().mean().backward()
    assert without_gradient(model) == []
    model.eval()
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_and_weights_are_medssms(name):
    model = build(name, num_classes=5).eval()
    own = medssm.create_model(name, 2, 2, 5, **ALL[name]).eval()
    own.load_state_dict(model.state_dict())
    x = torch.randn(1, 2, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), own(x))


@pytest.mark.parametrize("name", ALL)
def test_feature_pyramids(name):
    pyramid, own = build(name, features_only=True), medssm.create_model(name, 2, 2, 3, features_only=True, **ALL[name])
    depth = ALL[name]["depth"] if name in STACKS else 1
    channels = own.channels * depth
    assert pyramid.feature_info.channels() == channels and pyramid.feature_info.reduction() == [s[0] for s in own.strides] * depth
    maps = pyramid(torch.randn(1, 2, 64, 64))
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == list(zip(channels, pyramid.feature_info.reduction(), strict=True))
    whole = build(name).eval()
    first = build(name, features_only=True, out_indices=(-2, 0)).eval()
    assert first.feature_info.channels() == [channels[-2], channels[0]]
    x = torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        final, every = whole.forward_intermediates(x)
        assert torch.equal(final, whole.forward_features(x))
        for found, wanted in zip(first(x), (every[-2], every[0]), strict=True):
            assert torch.equal(found, wanted)
        assert len(whole.forward_intermediates(x, indices=1, intermediates_only=True)) == 1
    sum(m.square().mean() for m in first(x)).backward()
    assert without_gradient(first) == []
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in pyramid.parameters())


@pytest.mark.parametrize("name", STACKS)
def test_the_maps_of_a_stack_are_those_of_shorter_stacks(name):
    model = build(name, depth=4).eval()
    x = torch.randn(2, 2, 64, 48)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        normalised = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert len(maps) == len(normalised) == 4
        last = model.encoder(x)[-1]
        assert torch.equal(normalised[-1], last)
        patches = final[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, last.shape[2:]) if name == "vim" else final
        assert torch.equal(patches, last)
        for i in range(4):
            short = copy.deepcopy(model.encoder)
            short.stages, short.taps = short.stages[: i + 1], [i]
            torch.testing.assert_close(short(x)[0], normalised[i])
            short.norm = torch.nn.Identity()
            torch.testing.assert_close(short(x)[0], maps[i])
        two = model.forward_intermediates(x, indices=(2, 0), intermediates_only=True)
        assert torch.equal(two[0], maps[2]) and torch.equal(two[1], maps[0])
    pyramid = build(name, features_only=True, depth=4)
    assert pyramid.feature_info.out_indices == (1, 2, 3) and len(pyramid(x)) == 3  # timm's default for such models: the last three


@pytest.mark.parametrize("name", ALL)
def test_weights_of_a_file_are_fitted_to_other_channels_and_classes(name, tmp_path):
    file = tmp_path / "weights.pth"
    coloured = build(name, in_chans=3).eval()
    torch.save(coloured.state_dict(), file)
    fitted = build(name, in_chans=1, num_classes=5, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert fitted(grey).shape == (1, 5)
        if name == "lightm_unet":  # depthwise first: the kernels' mean, then the sum of the pointwise weights
            depthwise, pointwise = coloured.encoder.stem[0]
            torch.testing.assert_close(fitted.encoder.stem[0][0].weight, depthwise.weight.mean(0, keepdim=True))
            torch.testing.assert_close(fitted.encoder.stem[0][1].weight, pointwise.weight.sum(1, keepdim=True))
        else:  # a grey image is a coloured one of three equal channels
            torch.testing.assert_close(fitted.forward_features(grey), coloured.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vmamba", "vim", "umamba_bot"])
def test_classifiers_are_reset_and_left_out(name):
    model = build(name, num_classes=5).eval()
    model.reset_classifier(7)
    x = torch.randn(1, 2, 64, 64)
    assert model(x).shape == (1, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity) and model(x).shape == (1, model.num_features)
    assert build(name, num_classes=0)(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).ndim == (3 if name == "vim" else 4)
    with pytest.raises(ValueError, match="global_pool: expected 'avg' or ''"):
        model.reset_classifier(3, "max")


def test_timms_own_tools_work(tmp_path):
    model = build("vmamba", num_classes=5, drop_rate=0.1, drop_path_rate=0.3)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    again = build("vmamba", num_classes=5, checkpoint_path=str(tmp_path / "x.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)
    from timm.optim import create_optimizer_v2

    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.8).param_groups
    assert len({group["lr_scale"] for group in groups}) > 1
    assert any(name.endswith("A_logs") for name in model.no_weight_decay())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="width: expected one of vmamba's options"):
        build("vmamba", width=3)
    with pytest.raises(ValueError, match="indices: expected -2 to 1, the model's maps"):
        build("vmamba", features_only=True, out_indices=(4,))
