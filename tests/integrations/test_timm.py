"""timm: create_model, classifiers, feature pyramids. Needs a timm that can be imported (it imports torchvision)."""

import pytest
import torch

import medssm
from tests.models.test_models import ALL, CLASSIFIERS

try:
    import timm

    from medssm.integrations import timm as integration
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

# Not the 4 channels of other tests: the backward of torch 2.13 for a 1 x 1 convolution with stride 2 on few channels-last channels crashes on a CPU.
ALL = ALL | {name: {"features": (16, 16, 32)} for name in ("umamba_bot", "umamba_enc")}
SIZED = {"medssm_unet": "tiny", "medmamba": "tiny", "vim": "tiny", "vmamba": "tiny", "mlla": "tiny", "vrwkv": "tiny"}


@pytest.fixture(scope="module", autouse=True)
def names():
    return integration.register()


def build(model, **options):
    torch.manual_seed(0)
    name = "medssm_" + model.removeprefix("medssm_") + (f"_{SIZED[model]}" if model in SIZED else "")
    return timm.create_model(name, in_chans=2, **{k: v for k, v in ALL[model].items() if k != "size"}, **options)


def test_register_enters_the_models_and_may_be_called_again(names, recwarn):
    assert {"medssm_vmamba_tiny", "medssm_medmamba_base", "medssm_vim_small", "medssm_unet_tiny", "medssm_umamba_enc"} <= set(names)
    assert set(names) <= set(timm.list_models("medssm_*")) and integration.register() == names
    assert not [w for w in recwarn if "registry" in str(w.message)]


@pytest.mark.parametrize("name", ALL)
def test_every_encoder_classifies_and_learns(name):
    model = build(name, num_classes=5)
    x = torch.randn(2, 2, 64, 64)
    logits = model(x)
    assert logits.shape == (2, 5) and model.num_classes == 5 and model.get_classifier().out_features == 5
    logits.square().mean().backward()
    unread = tuple(f"encoder.outs.{i}." for i in range(len(model.feature_info) - 1))  # SegMamba's finer maps, each with layers of its own
    assert not [n for n, p in model.named_parameters() if not n.startswith(unread) and (p.grad is None or not p.grad.isfinite().all())]
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
    assert pyramid.feature_info.channels() == own.channels and pyramid.feature_info.reduction() == [s[0] for s in own.strides]
    maps = pyramid(torch.randn(1, 2, 64, 64))
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == list(zip(own.channels, pyramid.feature_info.reduction(), strict=True))
    if len(own.channels) > 1:
        whole = build(name).eval()
        first = build(name, features_only=True, out_indices=(-2, 0)).eval()
        assert first.feature_info.channels() == [own.channels[-2], own.channels[0]]
        x = torch.randn(1, 2, 64, 64)
        with torch.no_grad():
            final, every = whole.forward_intermediates(x)
            assert torch.equal(final, whole.forward_features(x))
            for found, wanted in zip(first(x), (every[-2], every[0]), strict=True):
                assert torch.equal(found, wanted)
            assert len(whole.forward_intermediates(x, indices=1, intermediates_only=True)) == 1
        assert name == "segmamba" or sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in pyramid.parameters())


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
