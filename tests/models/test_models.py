"""The registry and the networks: any size, deep supervision, anisotropic strides, weights from files, export."""

import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import medssm
from medssm import models, orders
from medssm.integrations.nnunet.networks import output_resolutions
from medssm.models.monai import NETWORKS
from medssm.nn.mixers import MIXERS
from medssm.nn.vss import DropPath, PatchMerging

# Each network as small as it goes: segmentation networks with a head per level, those with one head, and classifiers.
MONAIS = {name: dict(models.model_facts(name).small) for name in NETWORKS}
ALL = {name: dict(models.model_facts(name).small) for name in medssm.list_models() if name not in MONAIS}
CLASSIFIERS = {name: small for name, small in ALL.items() if models.model_facts(name).task == "classify"}
SMALL = {name: small for name, small in ALL.items() if "deep_supervision" in models.model_options(name)}
SINGLE = {name: small for name, small in ALL.items() if name not in SMALL and name not in CLASSIFIERS}


def build(name, dims, **kw):
    torch.manual_seed(0)
    return medssm.create_model(name, spatial_dims=dims, in_channels=2, out_channels=3, **{**(ALL | MONAIS)[name], **kw})


def test_names():
    assert medssm.list_models("umamba*") == ["umamba_bot", "umamba_enc"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL | SINGLE)
def test_an_input_that_shrinks_to_one_voxel(name, training):
    """Instance norms have no statistics of it; upstream raises."""
    model = build(name, 3).train(training)
    y = model(torch.randn(2, 2, *model.size_divisor))
    assert y.shape == (2, 3, *model.size_divisor) and torch.isfinite(y).all()
    y.square().mean().backward()


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_any_input_size_and_every_parameter_learns(name, dims, deep_supervision):
    model = build(name, dims, deep_supervision=deep_supervision)
    y = model(torch.randn(1, 2, *(33, 38, 35)[:dims]))
    outputs = y if deep_supervision else [y]
    assert outputs[0].shape == (1, 3, *(33, 38, 35)[:dims])
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SINGLE)
def test_any_input_size_of_networks_with_one_head(name, dims):
    model = build(name, dims)
    y = model(torch.randn(1, 2, *(33, 38, 35)[:dims]))
    assert y.shape == (1, 3, *(33, 38, 35)[:dims])
    y.square().mean().backward()
    learned = {n: p.grad is not None and bool(torch.isfinite(p.grad).all()) for n, p in model.named_parameters()}
    assert all(learned.values()), [n for n, yes in learned.items() if not yes]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_take_any_input_size(name, dims):
    model = build(name, dims)
    for size in ((32, 32, 32), (35, 29, 21)):
        y = model(torch.randn(2, 2, *size[:dims]))
        assert y.shape == (2, 3)
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_a_classifier_on_any_encoder_learns_with_every_parameter(name):
    features = build(name, 2, features_only=True)
    own = [n for n, _ in features.named_parameters()]
    x = torch.randn(2, 2, 64, 64)
    model = medssm.nn.Classifier(features.encoder, 5)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, _ in features.named_parameters()] == own  # the encoder that was given stays whole


@pytest.mark.each_network
@pytest.mark.parametrize("size", [(3, 37, 5), (33, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [*ALL, *(name for name, network in NETWORKS.items() if network.divisor)])  # MONAI's UNETR takes one size
def test_an_axis_shorter_than_the_strides(name, dims, size):
    if name in MONAIS and dims == 3 and size != (33, 2, 4):
        pytest.skip("one size of MONAI's large networks")
    model = build(name, dims)
    y = model(torch.randn(2, 2, *size[:dims]))
    assert y.shape == ((2, 3) if name in CLASSIFIERS else (2, 3, *size[:dims]))
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dims", "sizes"), [("medmamba", 2, [(31, 31), (31, 500)]), ("medmamba", 3, [(24, 64, 64)]), ("vim", 2, [(15, 15), (7, 40)])]
)
def test_a_small_image_is_padded_with_zeros(name, dims, sizes):
    options = {"features": (8, 8, 8, 8), "depths": (1, 1, 1, 1)} if name == "medmamba" else {"patch": 16}
    model, least = build(name, dims, **options).eval(), 32 if name == "medmamba" else 16
    for size in sizes:
        x = torch.randn(2, 2, *size)
        padded = torch.zeros(2, 2, *(max(n, least) for n in size))
        padded[(..., *map(slice, size))] = x
        with torch.no_grad():
            assert torch.equal(model(x), model(padded))


@pytest.mark.parametrize("cls", ["middle", "first", "both", None])
def test_vims_class_tokens(cls):
    model = build("vim", 2, cls=cls).eval()
    x = torch.randn(2, 2, 32, 40)
    with torch.no_grad():
        assert model(x).shape == (2, 3) and model.encoder(x)[0].shape == (2, 16, 4, 5)
        assert len(model.encoder.tokens(x)[2]) == {None: 0, "both": 2}.get(cls, 1)


def test_stochastic_depth_leaves_whole_samples_out():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y[kept], x[kept] / 0.75) and not y[~kept].any() and abs(kept.float().mean() - 0.75) < 0.03
    assert torch.equal(drop.eval()(x), x)


def test_patch_merging_orders_voxels_as_vmamba():
    x = torch.arange(2.0 * 3).view(1, 1, 2, 3)
    merge = PatchMerging(1)
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    assert merge(x).flatten().tolist() == [0, 3, 1, 4]
    assert merge.__class__(1, pad=True).to(torch.float64)(x.double()).shape == (1, 2, 1, 2)


@pytest.mark.parametrize("name", SMALL | SINGLE)
def test_padding_changes_nothing_where_strides_divide(name):
    model = build(name, 2).eval()
    divisor = model.size_divisor
    x = torch.randn(1, 2, *(2 * d for d in divisor))
    strict = build(name, 2, input_size="strict").eval()
    with torch.no_grad():
        assert torch.equal(model(x), strict(x))
        with pytest.raises(ValueError, match="expected spatial axis 1 to be a multiple of"):
            strict(x[..., :-1])


@pytest.mark.parametrize("name", SMALL)
def test_deep_supervision_is_nnunets_list(name):
    model = build(name, 3, deep_supervision=True).eval()
    x = torch.randn(1, 2, 16, 16, 16)
    outputs = model(x)
    levels = [axes[0] for axes in output_resolutions(model)]
    assert levels == {"segmamba": [1, 2, 4], "swin_umamba_d": [1, 4], "medssm_unet": [1, 2, 4, 8]}.get(name, levels) and levels[:1] == [1]
    assert isinstance(outputs, list) and [o.shape[2] for o in outputs] == [-(-16 // n) for n in levels]
    model.decoder.deep_supervision = False
    assert torch.equal(model(x), outputs[0])
    with pytest.raises(ValueError, match="deep_supervision: this decoder has a head for the finest level alone"):
        build(name, 3).decoder.deep_supervision = True


@pytest.mark.parametrize("name", ["medssm_unet", "umamba_bot", "umamba_enc"])
def test_anisotropic_strides(name):
    model = build(
        name,
        3,
        **({"features": (8, 8, 16), "depths": (1, 1, 1), "decoder_depths": (1, 1)} if name == "medssm_unet" else {}),
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2)],
    )
    assert model.size_divisor == (2, 4, 4)
    assert model(torch.randn(1, 2, 6, 8, 12)).shape == (1, 3, 6, 8, 12)


@pytest.mark.parametrize("name", ALL)
def test_features_only(name):
    model = build(name, 2, features_only=True).eval()
    maps = model(torch.randn(1, 2, 32, 32))
    assert [m.shape[1] for m in maps] == model.channels and [32 // m.shape[2] for m in maps] == [s[0] for s in model.strides]


@pytest.mark.parametrize("name", ["medssm_unet", "umamba_enc", "vmamba"])
def test_pretrained_from_a_file_or_a_folder(name, tmp_path):
    model = build(name, 2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    torch.save({"network_weights": model.state_dict()}, tmp_path / "checkpoint.pth")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "checkpoint.pth"):
        torch.manual_seed(1)
        loaded = medssm.create_model(name, 2, 2, 3, pretrained=path, **ALL[name])
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="pretrained: no file"):
        medssm.create_model(name, 2, 2, 3, pretrained=tmp_path / "none.pth", **ALL[name])
    with pytest.raises(ValueError, match="wrongly shaped"):
        medssm.create_model(name, 2, 1, 3, pretrained=tmp_path, **ALL[name])


@pytest.mark.parametrize("numpy_module", [b"numpy.core", b"numpy._core"])
def test_nnunets_checkpoints_are_read(tmp_path, numpy_module):
    """nnU-Net keeps its log of NumPy numbers beside the weights; the name of NumPy's module changed with its version 2."""
    model = build("umamba_enc", 2)
    log = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "dice_per_class": [[np.float64(0.5)]], "epoch": np.int64(3)}
    path = tmp_path / "checkpoint_final.pth"
    torch.save(
        {
            "network_weights": model.state_dict(),
            "optimizer_state": {"lr": 1e-2},
            "grad_scaler_state": None,
            "logging": log,
            "_best_ema": np.float64(0.7),
            "current_epoch": 3,
            "init_args": {"plans": {"a": [1, 2]}, "fold": 0},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1),
        },
        path,
    )
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    written, pickled = re.compile(rb"cnumpy\._?core\.multiarray\n"), b"c" + numpy_module + b".multiarray\n"
    assert any(written.search(data) for data in parts.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, written.sub(pickled, data))
    loaded = medssm.create_model("umamba_enc", 2, 2, 3, pretrained=path, **SMALL["umamba_enc"])
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


def test_numpys_objects_are_not_read(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "log": np.array([{"an": "object"}], dtype=object)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        medssm.create_model("medssm_unet", 2, pretrained=tmp_path / "x.pth")


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        medssm.create_model("medssm_unet", 2, pretrained=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_wrong_names_and_options_are_named():
    with pytest.raises(ValueError, match=r"name: expected one of .*, medmamba, .*medssm_unet, "):
        medssm.create_model("unet")
    with pytest.raises(ValueError, match="width: expected one of medssm_unet's options"):
        medssm.create_model("medssm_unet", width=3)
    with pytest.raises(ValueError, match="size: expected one of tiny, small, base"):
        medssm.create_model("medssm_unet", size="huge")
    with pytest.raises(ValueError, match="spatial_dims: expected 2 or 3"):
        medssm.create_model("umamba_bot", spatial_dims=1)
    with pytest.raises(ValueError, match="name: expected one of"):
        medssm.from_upstream("resnet")


def test_registering_a_model(monkeypatch):
    monkeypatch.setattr(models.registry, "_models", dict(models.registry._models))

    @medssm.register_model("test_identity", facts=models.Facts(source="somewhere"))
    def identity(spatial_dims, in_channels, out_channels, size="tiny"):
        return torch.nn.Identity()

    assert isinstance(medssm.create_model("test_identity", size="small"), torch.nn.Identity)
    assert models.model_facts("test_identity").source == "somewhere" and models.model_options("test_identity") == ["size"]
    with pytest.raises(ValueError, match="width: expected one of test_identity's options size, got 'width'"):
        medssm.create_model("test_identity", width=3)
    with pytest.raises(ValueError, match="which is taken"):
        medssm.register_model("test_identity", lambda **kw: None)
    assert medssm.register_model("test_other", identity) is identity and models.model_facts("test_other") == models.Facts()


@pytest.mark.parametrize(("name", "options"), MONAIS.items())
def test_monais_networks_for_comparison(name, options):
    model = medssm.create_model(name, 2, 2, 3, **options).eval()
    size = (32, 32) if name == "monai_unetr" else (37, 70)
    with torch.no_grad():
        assert model(torch.randn(1, 2, *size)).shape == (1, 3, *size)
    with pytest.raises(ValueError, match=f"{name}: .*width"):
        medssm.create_model(name, 2, width=3)


def test_what_monai_leaves_optional_is_named(monkeypatch):
    def without_einops(**_options):
        raise ImportError("from einops.layers.torch import Rearrange (No module named 'einops').\nmore")

    monkeypatch.setattr("monai.networks.nets.UNETR", without_einops)
    with pytest.raises(ValueError, match=r"monai_unetr needs .*pip install '.\[segment\]' \(in medssm's source folder\): from einops.*$"):
        medssm.create_model("monai_unetr", 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_of_medssm_unet_trains(size, dims):
    model = medssm.create_model("medssm_unet", dims, 1, 3, size=size)
    out = model(torch.randn(2, 1, *(32,) * dims))
    assert out.shape == (2, 3, *(32,) * dims)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dims", [pytest.param(2, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=pytest.mark.thorough if name in ("kda", "rwkv7") else ()) for name in MIXERS if name != "ss_nd"]
)
def test_every_mixer_in_medssm_unet(mixer, dims):
    options = {"features": (4, 6, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0), "mixer": mixer}
    model = build("medssm_unet", dims, **options)
    size = (9, 14, 11)[:dims]
    out = model(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, losses = torch.randn(2, 2, *(16, 8, 8)[:dims]), []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        losses.append(torch.nn.functional.cross_entropy(y.float(), (x[:, 0] > 0).long()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]


def test_orders_of_medssm_unet_are_walked_by_its_mixers():
    options = {"features": (4, 6, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0)}
    torch.manual_seed(0)
    text = build("medssm_unet", 2, orders=["hilbert()", "raster(axes=(1, 0), reverse=True)"], **options).eval()
    torch.manual_seed(0)
    same = build("medssm_unet", 2, orders=[orders.hilbert(), orders.raster((1, 0), reverse=True)], **options).eval()
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(text(x), same(x))
    walked = [part.orders for part in text.modules() if isinstance(part, medssm.nn.SSND)]
    assert walked == [[orders.hilbert(), orders.raster((1, 0), reverse=True)]]
    for mixer in ("gla", "delta", "mamba2"):
        assert build("medssm_unet", 2, mixer=mixer, orders=["snake()"], **options)(x).shape == text(x).shape


def test_options_that_a_mixer_has_not_are_named():
    with pytest.raises(ValueError, match="orders: expected None, which mixer='rwkv' has not, got"):
        build("medssm_unet", 2, mixer="rwkv", orders=["raster()"])
    with pytest.raises(ValueError, match=r"spec: expected one of raster, .*, got 'spiral'"):
        build("medssm_unet", 2, orders=["spiral"])
    with pytest.raises(ValueError, match=r"mixer: expected one of ss_nd, linear_attention, gla, .*, got 'mamba'"):
        build("medssm_unet", 2, mixer="mamba")
    with pytest.raises(ValueError, match="expand: expected None, which mixer='linear_attention' has not, got 2"):
        build("medssm_unet", 2, mixer="linear_attention", expand=2)


@pytest.mark.parametrize("decoder_depths", [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_any_decoder_depth(decoder_depths):
    model = build("medssm_unet", 2, features=(8, 12, 16), depths=(0, 1, 1), decoder_depths=decoder_depths, deep_supervision=True)
    outs = model(torch.randn(2, 2, 16, 16))
    assert [out.shape[1:] for out in outs] == [(3, 16, 16), (3, 8, 8)]


def test_norms_do_not_see_other_voxels():
    """Streamable: away from the border of a change, a purely local network's output does not change."""
    model = build("medssm_unet", 2, features=(8, 8), depths=(1, 1), decoder_depths=(1,), scans_from=9).eval()
    x = torch.randn(1, 2, 64, 64)
    other = x.clone()
    other[..., 48:, :] += 5
    with torch.no_grad():
        torch.testing.assert_close(model(x)[..., :24, :], model(other)[..., :24, :])


@pytest.mark.parametrize("name", ALL)
def test_forward_creates_no_attributes(name):
    """torch.export of torch 2.9 refuses a network whose forward keeps something for the next."""
    model = build(name, 2).eval()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad():
        model(torch.randn(1, 2, 33, 38))
        model(torch.randn(1, 2, *getattr(model, "size_divisor", (32, 32))))
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("name", [name if name in ("vmunet", "vrwkv", "egeunet") else pytest.param(name, marks=pytest.mark.thorough) for name in ALL])
def test_export(name):
    model = build(name, 2).eval()
    x = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", ["vim", "vrwkv"])
def test_an_image_size_of_other_dimensions_is_refused(name):
    with pytest.raises(ValueError, match=r"image_size: expected 2 values, one per axis, got \[32, 32, 32\]"):
        build(name, 2, image_size=(32, 32, 32))
