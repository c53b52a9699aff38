"""Every Triton kernel compiles for GPUs without one here, and no register spills."""

import importlib.util

import pytest

from tests.kernels import resources

if importlib.util.find_spec("triton") is None or resources.cuobjdump() is None:
    pytest.skip("needs Triton and cuobjdump", allow_module_level=True)

from tests.kernels import triton_resources

KERNELS = {
    "selective_scan": {"local", "carry", "apply", "local_adjoint", "adjoint"},
    "selective_scan_nd": {"local", "carry", "apply", "local_adjoint", "adjoint"},
    "bi_wkv": {"local", "carry", "outputs", "tokens_adjoint"},
    "gated_linear_attention": {
        "chunk_states",
        "carry",
        "key_pairs",
        "outputs",
        "value_gradients",
        "pair_gradients",
        "query_key_gradients",
        "decay_gradients",
    },
    "ssd": {"chunk_states", "carry", "outputs", "value_gradients", "query_gradients", "key_gradients", "decay_gradients"},
    "causal_conv1d": {"_forward", "_backward"},
    "depthwise_conv": {"_conv", "_weights"},
    "linear_attention": {"sums", "outputs", "factors", "inputs"},
    "linear_attention_causal": {"chunk_states", "carry", "outputs", "value_gradients", "query_gradients", "key_gradients"},
    "delta_rule": {
        "inverse",
        "carry",
        "compose",
        "outputs",
        "outer",
        "carry_back",
        "pair_gradients",
        "query_gradients",
        "entry_key_gradients",
        "exit_key_gradients",
        "walk",
        "walk_back",
    },
}


@pytest.mark.long
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_kernels_compile_and_do_not_spill(everything):
    """One configuration an op for one generation of GPUs, compiled where a kernel or Triton changed since the committed record; in `make test-all`
    every configuration for all of them, compiled anew."""
    targets = triton_resources.TARGETS if everything else ["90"]
    rows = triton_resources.rows(*targets, "--all" if everything else "--known")
    for target in targets:
        for op, kernels in KERNELS.items():
            assert {row["kernel"] for row in rows if row["op"] == op and row["target"] == f"sm_{target}"} == kernels, (op, target)
    for op in ("gated_linear_attention", "ssd"):  # both forms of the carry, both ways
        forms = {(row["constants"]["TOTALS"], row["constants"]["BACKWARD"]) for row in rows if row["op"] == op and row["kernel"] == "carry"}
        assert len(forms) == 4, (op, forms)
    for kernel in ("carry", "carry_back"):  # within segments of chunks and across them
        assert {row["constants"]["ACROSS"] for row in rows if row["op"] == "delta_rule" and row["kernel"] == kernel} == {False, True}, kernel
    spilled = [row for row in rows if row["stack"] or row["local"]]
    assert not spilled, spilled


@pytest.mark.thorough
def test_the_record_is_what_is_compiled_now():
    """After a change of a kernel: python tests/kernels/triton_resources.py 90 --record"""
    known, anew = triton_resources.rows("90", "--known"), triton_resources.rows("90")
    assert sorted(map(str, known)) == sorted(map(str, anew))


def test_a_changed_kernel_is_not_taken_from_the_record(monkeypatch):
    launch, other = triton_resources.distinct(False, ["causal_conv1d"])[:2]
    key = triton_resources.digest(launch, "90")
    assert key == triton_resources.digest(launch, "90")
    assert len({key, triton_resources.digest(launch, "100"), triton_resources.digest(other, "90")}) == 3
    changed = (*launch[:2], launch[2] | {"num_warps": 16})
    assert triton_resources.digest(changed, "90") != key
    monkeypatch.setattr(type(launch[1]), "cache_key", "another source")
    assert triton_resources.digest(launch, "90") != key
