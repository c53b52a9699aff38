"""The stand-in's mixers token by token: gradients, whose state it is, batches that do not fit."""

import types

import pytest
import torch

from tests.integrations.compare import draw, gradients, same


def inference():
    return types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)


def mixer(kind, **options):
    """A Mamba or Mamba2 of 8 channels in float64."""
    import mamba_ssm

    torch.manual_seed(0)
    own = {"Mamba": {"d_state": 4}, "Mamba2": {"d_state": 5, "headdim": 4, "ngroups": 2, "dt_limit": (0.01, 0.05)}}[kind]
    return getattr(mamba_ssm, kind)(8, **own, **options).double()


def continued(m, x, start, cache):
    """The sequence's first part, then one token after the other."""
    cache.seqlen_offset = 0
    outs = [m(x[:, :start], inference_params=cache)] if start else []
    for t in range(start, x.shape[1]):
        cache.seqlen_offset = t
        outs.append(m(x[:, t : t + 1], inference_params=cache))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_gradients_of_steps_are_the_scans(installed, kind):
    m, x = mixer(kind), draw(2, 7, 8)
    want, states = m(x), m.allocate_inference_cache(2, 7)
    out = torch.cat([m.step(x[:, t : t + 1], *states)[0] for t in range(7)], 1)
    same([out], [want])
    same(gradients(out, (x, *m.parameters())), gradients(want, (x, *m.parameters())))


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("start", [1, 2, 5])
def test_gradients_pass_from_steps_to_the_first_part(installed, kind, start):
    """Also in a second sequence with the same cache, whose first one went backward."""
    m, x, cache = mixer(kind, layer_idx=0), draw(2, 7, 8), inference()
    for _ in range(2):
        want, out = m(x), continued(m, x, start, cache)
        same([out], [want])
        weights = torch.randn_like(want)
        inputs = [x, *m.parameters()]
        same(torch.autograd.grad((out * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs))


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_states_without_gradients_have_no_history(installed, kind):
    m, x, cache = mixer(kind, layer_idx=0), draw(2, 7, 8), inference()
    with torch.no_grad():
        continued(m, x, 3, cache)
    assert not any(state.requires_grad for state in cache.key_value_memory_dict[0])


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_a_state_without_an_owner_is_refused(installed, kind):
    with pytest.raises(ValueError, match=r"layer_idx: expected a number of its own for each mixer whose state inference_params keeps, got None"):
        mixer(kind)(draw(2, 3, 8), inference_params=inference())


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_than_the_states_is_refused(installed, kind, batch):
    m, cache = mixer(kind, layer_idx=4), inference()
    m(draw(2, 3, 8), inference_params=cache)
    for offset, length in ((0, 3), (3, 1)):
        cache.seqlen_offset = offset
        with pytest.raises(ValueError, match=rf"hidden_states: expected a batch of 2, whose states layer 4 keeps, got a batch of {batch}"):
            m(draw(batch, length, 8), inference_params=cache)
    with pytest.raises(ValueError, match=rf"hidden_states: expected a batch of 2, as the states have, got a batch of {batch}"):
        m.step(draw(batch, 1, 8), *m.allocate_inference_cache(2, None))
