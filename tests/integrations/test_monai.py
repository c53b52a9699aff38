"""MONAI: encoders in FlexibleUNet, MetaTensor in and out, sliding windows."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.networks.nets import FlexibleUNet
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE

import medssm
from medssm.integrations import monai
from tests.models.test_models import ALL, CLASSIFIERS

# Not the 4 channels of other tests: the backward of torch 2.13 for a 1 x 1 convolution with stride 2 on few channels-last channels crashes on a CPU.
ALL = ALL | {name: {"features": (16, 16, 32)} for name in ("umamba_bot", "umamba_enc")}
SEGMENTING = [name for name in ALL if name not in CLASSIFIERS]
AFFINE = torch.tensor([[0, 0, 2.0, 5], [-1.5, 0, 0, 6], [0, 1, 0, -7], [0, 0, 0, 1]], dtype=torch.float64)


@pytest.fixture
def small():
    """Registers a model's small version; what was registered goes again."""
    names = []

    def register(model, **options):
        names.append(monai.register_encoder(f"small_{model}", model, **{**ALL[model], **options}))
        return names[-1]

    yield register
    for name in set(names):
        FLEXUNET_BACKBONE.register_dict.pop(name)
        monai.Backbone.entries.pop(name)


def flexible(backbone, dims, **options):
    torch.manual_seed(0)
    return FlexibleUNet(in_channels=2, out_channels=3, backbone=backbone, spatial_dims=dims, decoder_channels=(16, 8, 8, 4, 4), **options)


def test_register_enters_every_model_with_an_encoder_and_may_be_called_again():
    names = monai.register()
    wanted = {"medssm_" + name.removeprefix("medssm_") for name in ALL} - {"medssm_zigrir"}  # its defaults go to 1/64, the sixth map
    assert wanted <= set(names) and "medssm_umamba_enc" in names and not any("monai" in name for name in names)
    known = len(FLEXUNET_BACKBONE.register_dict)
    assert monai.register() == names and len(FLEXUNET_BACKBONE.register_dict) == known
    assert {"resnet18", "efficientnet-b0"} <= set(FLEXUNET_BACKBONE.register_dict)


@pytest.mark.each_network
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_every_encoder_trains_in_flexible_unet(small, name, dims):
    net = flexible(small(name), dims)
    x = torch.randn(2, 2, *(32, 48, 32)[:dims])
    maps = net.encoder(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *(n >> s for n in x.shape[2:])) for s, c in enumerate(net.encoder.channels, 1)]
    y = net(x)
    assert y.shape == (2, 3, *x.shape[2:])
    y.square().mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("name", ["umamba_enc", "vmamba"])
def test_any_even_size_and_an_odd_one_loses_a_voxel(small, name):
    net = flexible(small(name), 2).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 2, 50, 70)).shape[2:] == (50, 70)
        assert net(torch.randn(1, 2, 33, 47)).shape[2:] == (32, 46)
    with pytest.raises(ValueError, match=r"x: expected at least .* voxels, the coarsest map's stride, got \(2, 64\)"):
        net(torch.randn(1, 2, 2, 64))


def test_u_mamba_bot_keeps_its_mamba(small):
    encoder = flexible(small("umamba_bot"), 2).encoder
    assert any("MambaLayer" in type(module).__name__ for module in encoder.modules())


def test_weights_from_a_file_never_from_elsewhere(small, tmp_path):
    name = small("umamba_enc", out_channels=4)
    trained = medssm.create_model("umamba_enc", 2, 2, 4, **ALL["umamba_enc"])
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    net = flexible(name, 2, pretrained=str(tmp_path / "model.pt"))
    for key, value in net.encoder.encoder.state_dict().items():
        assert torch.equal(value, trained.encoder.state_dict()[key])
    with pytest.raises(ValueError, match="pretrained: expected False or a file of weights"):
        flexible(name, 2, pretrained=True)


def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"model: expected maps that FlexibleUNet takes.*umamba_enc has the strides"):
        monai.register_encoder("x", "umamba_enc", features=(4, 8, 8), strides=(1, (1, 2), 2))
    with pytest.raises(ValueError, match="5 at most"):
        monai.register_encoder("x", "umamba_enc", features=(4,) * 7)
    with pytest.raises(ValueError, match=r"5 at most; zigrir has the strides .*\(64, 64\)\]"):
        monai.register_encoder("x", "zigrir")
    with pytest.raises(ValueError, match="has no encoder"):
        monai.register_encoder("x", "monai_unetr")
    assert "x" not in FLEXUNET_BACKBONE.register_dict


@pytest.mark.parametrize("name", SEGMENTING)
def test_models_take_and_give_meta_tensors(name):
    model = medssm.create_model(name, 3, 2, 3, **ALL[name]).eval()
    x = MetaTensor(torch.randn(1, 2, 33, 20, 38), affine=AFFINE, meta={"filename_or_obj": "scan.nii.gz"})
    with torch.no_grad():
        y, plain = model(x), model(x.as_tensor())
    assert isinstance(y, MetaTensor) and y.shape == (1, 3, 33, 20, 38)
    assert torch.equal(y.affine, x.affine) and y.meta["filename_or_obj"] == "scan.nii.gz"
    assert torch.equal(y.as_tensor(), plain)


def test_a_backbone_takes_and_gives_meta_tensors_and_learns(small):
    net = flexible(small("segmamba"), 3)
    x = MetaTensor(torch.randn(1, 2, 32, 32, 32), affine=AFFINE)
    y = net(x)
    y.square().mean().backward()
    assert isinstance(y, MetaTensor) and torch.equal(y.affine, x.affine)
    assert not [n for n, p in net.named_parameters() if p.grad is None]


@pytest.mark.each_network
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SEGMENTING)
def test_sliding_windows(name, dims):
    model = medssm.create_model(name, dims, 2, 3, **ALL[name]).eval()
    x = MetaTensor(torch.randn(1, 2, *(45, 32, 32)[:dims]), affine=AFFINE)
    window = {"roi_size": (32,) * dims, "sw_batch_size": 2, "overlap": 0.25, "mode": "gaussian"}
    with torch.no_grad():
        y, adapted = (inferer(**window)(x, model) for inferer in (SlidingWindowInferer, SlidingWindowInfererAdapt))
        plain = SlidingWindowInferer(**window)(x.as_tensor(), model)
    for found in (y, adapted):
        assert isinstance(found, MetaTensor) and torch.equal(found.affine, x.affine) and found.shape == (1, 3, *x.shape[2:])
        torch.testing.assert_close(found.as_tensor(), plain)
