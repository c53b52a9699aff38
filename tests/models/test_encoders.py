"""Decoders on any encoder: EMCAD's and medssm_unet's."""

import pytest
import torch

import medssm
from medssm.integrations.nnunet.networks import output_resolutions
from medssm.models.encoders import encoder
from tests.models.test_models import ALL

DECODERS = ["emcad", "medssm_unet"]
QUICK = ["vim", "vmamba"]  # one map, and several
OTHERS = [pytest.param(name, marks=pytest.mark.thorough) for name in ALL if name not in (*QUICK, *DECODERS)]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_encoder(decoder, name):
    torch.manual_seed(0)
    model = medssm.create_model(decoder, 2, 2, 3, encoder=name, encoder_options=ALL[name], deep_supervision=name not in ("vim", "vrwkv"))
    outputs = model(torch.randn(2, 2, 40, 53))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sizes = [tuple(-(-n // step) for n, step in zip((40, 53), steps, strict=True)) for steps in output_resolutions(model)] or [(40, 53)]
    assert [tuple(y.shape) for y in outputs] == [(2, 3, *size) for size in sizes] and sizes[0] == (40, 53)
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_encoder_in_3d_exports(decoder):
    torch.manual_seed(0)
    model = medssm.create_model(decoder, 3, 1, 2, encoder="vmamba", encoder_options=ALL["vmamba"]).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_pvt_is_an_encoder(dims):
    maps = encoder("pvt_v2_b0", dims, 1)(torch.randn(1, 1, *[32] * dims))
    assert [tuple(m.shape) for m in maps] == [(1, c, *[n] * dims) for c, n in zip((32, 64, 160, 256), (8, 4, 2, 1), strict=True)]


def test_wrong_encoders_are_named():
    with pytest.raises(ValueError, match=r"encoder: name: expected one of .*, got 'resnet'"):
        medssm.create_model("emcad", 2, encoder="resnet")
    with pytest.raises(ValueError, match=r"encoder: features_only: .* has no encoder"):
        medssm.create_model("emcad", 2, encoder="monai_segresnet")
    with pytest.raises(ValueError, match="depths: expected None, as the encoder is vmamba's, got"):
        medssm.create_model("medssm_unet", 2, encoder="vmamba", depths=(1, 1))
