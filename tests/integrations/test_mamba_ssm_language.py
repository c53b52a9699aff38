"""The stand-in's language model: upstream's weights and files, tokens one by one equal to all at once, and what is drawn from the logits."""

import json
import math

import pytest
import torch
from torch import nn

from tests.integrations.compare import same

MIXERS = {
    "Mamba1": {"d_state": 4},
    "Mamba2": {"layer": "Mamba2", "d_state": 8, "headdim": 4},
    "Mamba3": {"layer": "Mamba3", "d_state": 8, "headdim": 4},
}
WEIGHTS = {
    "Mamba1": {
        "A_log": (32, 4),
        "D": (32,),
        "in_proj.weight": (64, 16),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "x_proj.weight": (9, 32),
        "dt_proj.weight": (32, 1),
        "dt_proj.bias": (32,),
        "out_proj.weight": (16, 32),
    },
    "Mamba2": {
        "A_log": (8,),
        "D": (8,),
        "dt_bias": (8,),
        "in_proj.weight": (88, 16),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
    },
    "Mamba3": {
        "B_bias": (8, 1, 8),
        "C_bias": (8, 1, 8),
        "D": (8,),
        "dt_bias": (8,),
        "in_proj.weight": (106, 16),
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "out_proj.weight": (16, 32),
    },
}


def model(kind="Mamba1", **config):
    """A small one with weights far from their start, so that tokens differ clearly."""
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    m = MambaLMHeadModel(MambaConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 29, "ssm_cfg": MIXERS[kind], **config}))
    nn.init.normal_(m.backbone.embedding.weight)
    nn.init.normal_(m.lm_head.weight)
    return m


def tokens(*shape):
    return torch.randint(0, 29, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MIXERS)
def test_weights_have_upstreams_names_and_shapes(installed, kind):
    m = model(kind, d_intermediate=130)
    want = {"backbone.embedding.weight": (32, 16), "backbone.norm_f.weight": (16,), "lm_head.weight": (32, 16)}  # 29 tokens in a multiple of 8
    for i in range(2):
        layer = f"backbone.layers.{i}."
        want |= {layer + "norm.weight": (16,), layer + "norm2.weight": (16,)}
        want |= {layer + "mlp.fc1.weight": (512, 16), layer + "mlp.fc2.weight": (16, 256)}  # 130 in a multiple of 128, twice
        want |= {f"{layer}mixer.{name}": shape for name, shape in WEIGHTS[kind].items()}
    assert {name: tuple(t.shape) for name, t in m.state_dict().items()} == want
    assert m.lm_head.weight is m.backbone.embedding.weight
    assert model(kind, tie_embeddings=False).lm_head.weight is not m.backbone.embedding.weight
    assert "backbone.layers.0.norm.bias" in model(kind, rms_norm=False).state_dict()


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("options", [{}, {"d_intermediate": 8, "fused_add_norm": False, "rms_norm": False}])
def test_token_by_token_is_all_at_once(installed, kind, options):
    from mamba_ssm.utils.generation import InferenceParams

    m, x = model(kind, **options), tokens(3, 9)
    want = m(x).logits
    assert want.shape == (3, 9, 32)
    same([m(x, num_last_tokens=2).logits], [want[:, -2:]], 1e-6)
    for memory in ({}, m.allocate_inference_cache(3, 9)):
        params = InferenceParams(max_seqlen=9, max_batch_size=3, key_value_memory_dict=memory)
        logits = [m(x[:, :4], inference_params=params).logits]
        for t in range(4, 9):
            params.seqlen_offset = t
            logits.append(m(x[:, t : t + 1], inference_params=params, num_last_tokens=1).logits)
        same([torch.cat(logits, 1)], [want], 1e-5)
        assert list(memory) == [0, 1]


def test_packed_prompts_go_on_as_each_alone(installed):
    from mamba_ssm.utils.generation import InferenceParams

    m, prompts = model("Mamba2"), [tokens(1, 9)[:, :n] for n in (9, 5, 7)]
    packed, cu_seqlens = torch.cat([p[:, :-2] for p in prompts], 1), torch.tensor([0, 7, 10, 15], dtype=torch.int32)
    params = InferenceParams(max_seqlen=9, max_batch_size=3)
    logits = [m(packed, inference_params=params, cu_seqlens=cu_seqlens).logits[0, cu_seqlens[1:] - 1, None]]
    for ahead in (-2, -1):
        params.seqlen_offset += 1
        logits.append(m(torch.cat([p[:, ahead, None] for p in prompts]), inference_params=params).logits)
    same([torch.cat(logits, 1)], [torch.cat([m(p).logits[:, -3:] for p in prompts])], 1e-5)


def test_the_mixer_model_is_its_blocks_and_a_norm(installed):
    from mamba_ssm.models.mixer_seq_simple import MixerModel

    m, x = MixerModel(d_model=16, n_layer=2, vocab_size=29, ssm_cfg={"d_state": 4}), tokens(2, 5)  # no d_intermediate: mamba_ssm 1's arguments
    total = m.embedding(x)
    for block in m.layers:
        total = total + block.mixer(block.norm(total))
    same([m(x)], [m.norm_f(total)], 1e-6)


def test_the_gated_mlp_is_its_formula(installed):
    from mamba_ssm.modules.mlp import GatedMLP

    m, x = GatedMLP(6, bias=True, multiple_of=4, out_features=5), torch.randn(2, 3, 6)
    y, gate = (x @ m.fc1.weight.T + m.fc1.bias).split([16, 16], -1)  # 8/3 of 6 is 16
    same([m(x)], [(y * gate * torch.sigmoid(gate)) @ m.fc2.weight.T + m.fc2.bias], 1e-6)
    assert GatedMLP(48).fc2.weight.shape == (48, 128)


def test_weights_start_as_upstreams(installed):
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MixerModel

    config = MambaConfig(d_model=64, n_layer=4, vocab_size=2000, d_intermediate=128, ssm_cfg={"bias": True})
    m = MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.1})
    assert abs(m.lm_head.weight.std() - 0.1) < 0.002
    mixer = m.backbone.layers[1].mixer
    assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any() and mixer.dt_proj.bias.all()
    # nn.Linear's start is uniform within 1 / sqrt(inputs); here over sqrt(layers), in the backbone alone over sqrt(2 layers) where there is an MLP.
    for backbone, residuals in ((m.backbone, 1), (MixerModel(64, 4, 128, 2000), 2)):
        for weight in (backbone.layers[1].mixer.out_proj.weight, backbone.layers[1].mlp.fc2.weight):
            assert 0.97 < weight.max() * math.sqrt(128) * math.sqrt(4 * residuals) <= 1


@pytest.mark.parametrize("kind", MIXERS)
def test_generate_takes_the_likeliest_token_each_time(installed, kind):
    m, x = model(kind, tie_embeddings=False), tokens(2, 4)  # tied, it repeats the last token
    want, scores = x, []
    for _ in range(6):
        scores.append(m(want).logits[:, -1])
        want = torch.cat([want, scores[-1].argmax(-1, keepdim=True)], 1)
    assert len(want[:, 4:].unique()) > 2
    assert torch.equal(m.generate(x, 10), want)
    assert torch.equal(m.generate(input_ids=x, max_length=10, cg=True), want)
    out = m.generate(x, max_length=10, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want) and len(out.scores) == 6
    same(out.scores, scores, 1e-4)
    assert m.generate(x, 10, return_dict_in_generate=True).scores is None


def test_generate_follows_a_teacher_and_stops(installed, capsys):
    m, x = model(), tokens(2, 10)
    out = m.generate(x[:, :4], 10, output_scores=True, return_dict_in_generate=True, teacher_outputs=x)
    assert torch.equal(out.sequences, x)
    same([torch.stack(out.scores, 1)], [m(x).logits[:, 3:-1]], 1e-4)
    x[:, 6] = 7
    assert torch.equal(m.generate(x[:, :4], 10, teacher_outputs=x, eos_token_id=7), x[:, :7])
    x[1, 6] = 8  # in one row only: it goes on
    assert torch.equal(m.generate(x[:, :4], 10, teacher_outputs=x, eos_token_id=7), x)
    assert m.generate(x, 10).shape == (2, 11)  # one token at least
    assert m.generate(x[:, :2], 9, vocab_size=3)[:, 2:].max() < 3 and not capsys.readouterr().out
    m.generate(x, 10, enable_timing=True)
    assert "Prompt processing + decoding time: " in capsys.readouterr().out


def test_generate_streams(installed):
    got = []

    class Streamer:
        put, end = got.append, lambda self: got.append("end")

    m, x = model(), tokens(1, 4)
    out = m.generate(x, 7, streamer=Streamer())
    assert got.pop() == "end" and torch.equal(torch.cat(got, 1), out) and len(got) == 4


def test_the_repetition_penalty_holds_for_every_earlier_token(installed):
    from mamba_ssm.utils.generation import modify_logit_for_repetition_penalty

    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0]])
    out = modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 1]]), 2.0)
    assert out is logits and out.tolist() == [[1.0, -4.0, 4.0, 1.0]]
    m, x = model(), tokens(1, 4)
    out = m.generate(x, 16, repetition_penalty=1e9)[0]
    assert len(set(out.tolist())) == len(set(x[0].tolist())) + 12  # nothing comes again


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"top_k": 0}, (0.05, 0.5, 0.15, 0.3)),
        ({"top_k": 0, "temperature": 0.5}, (0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365)),
        ({"top_k": 2}, (0, 0.625, 0, 0.375)),
        ({"top_k": 9, "top_p": 0.75}, (0, 0.625, 0, 0.375)),
        ({"top_k": 0, "top_p": 0.81}, (0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95)),
        ({"top_k": 0, "min_p": 0.5}, (0, 0.625, 0, 0.375)),
        ({"top_k": 3, "min_p": 0.2, "top_p": 1.0}, (0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95)),
        ({"top_k": 1}, (0, 1, 0, 0)),
    ],
)
def test_samples_come_as_often_as_they_should(installed, options, want):
    from mamba_ssm.utils.generation import sample

    torch.manual_seed(0)
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(20000, -1).clone()
    kept = logits.clone()
    got = sample(logits, **options).bincount(minlength=4) / 20000
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=0.015)
    assert torch.equal(logits, kept) and all(g == 0 for g, w in zip(got, want, strict=True) if w == 0)


def test_filters_write_into_the_logits(installed):
    from mamba_ssm.utils import generation

    for name, amount, want in (("min_p", 0.5, [0, 1, 0, 1]), ("top_k", 3, [0, 1, 1, 1]), ("top_p", 0.75, [0, 1, 0, 1]), ("top_p", 0.0, [1, 1, 1, 1])):
        logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
        getattr(generation, f"modify_logits_for_{name}_filtering")(logits, amount)
        assert logits.isfinite().int().tolist() == [want]
    with pytest.raises(ValueError, match=r"top_p: expected at most 1, got 1.5"):
        generation.sample(logits, top_k=0, top_p=1.5)


def test_saved_models_come_back(installed, tmp_path):
    from mamba_ssm import MambaLMHeadModel

    m, x = model("Mamba2"), tokens(2, 5)
    m.save_pretrained(tmp_path / "new")
    again = MambaLMHeadModel.from_pretrained(tmp_path / "new")
    assert again.config == m.config and again.lm_head.weight is again.backbone.embedding.weight
    assert torch.equal(again(x).logits, m(x).logits)
    half = MambaLMHeadModel.from_pretrained(str(tmp_path / "new"), device="cpu", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype is torch.bfloat16 and torch.equal(half.lm_head.weight, m.lm_head.weight.bfloat16())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_folder_of_upstreams_loads(installed, tmp_path):
    from mamba_ssm import MambaLMHeadModel

    m = model()  # an early config.json, of mamba_ssm 1
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"d_state": 4}, "rms_norm": True, "pad_vocab_size_multiple": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"expected a local folder with config.json and pytorch_model.bin; pytorch_model.bin is not in"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    torch.save(m.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path)(tokens(1, 6)).logits, m(tokens(1, 6)).logits)
    with pytest.raises(FileNotFoundError, match=r"expected a local folder .* is not in 'state-spaces/mamba-130m'"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")


@pytest.mark.parametrize("kind", MIXERS)
def test_it_trains(installed, kind):
    m, x = model(kind, d_intermediate=8), tokens(2, 8)
    nn.functional.cross_entropy(m(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in m.parameters())


def test_what_is_not_there_names_itself(installed):
    from mamba_ssm.modules.mha import MHA
    from mamba_ssm.utils.generation import GenerationMixin, update_graph_cache

    for name in (MHA, update_graph_cache):
        with pytest.raises(NotImplementedError, match=f"^{name.__name__} "):
            name(8, 2)
    with pytest.raises(NotImplementedError, match=r"attn_layer_idx: expected none \(MHA, attention, is not in this release of medssm\), got \[1\]"):
        model(attn_layer_idx=[1])
    with pytest.raises(NotImplementedError, match=r"GenerationMixin.allocate_inference_cache"):
        GenerationMixin().allocate_inference_cache(1, 2)
