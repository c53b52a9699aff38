"""Choosing a backend: the priority list, preferences, refusals with their reasons."""

import logging
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import medssm
from medssm import dispatch, ops, thresholds
from medssm.ops.op import OPS


def arguments():
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 5, 3, generator=g),
        torch.rand(1, 5, 3, generator=g),
        -torch.rand(3, 2, generator=g),
        torch.randn(1, 5, 2, generator=g),
        torch.randn(1, 5, 2, generator=g),
    ]


def chosen():
    return medssm.explain("selective_scan", *arguments())["chosen"]


# A machine with a GPU serves what these tests take for missing.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the expected choices are those of a machine without a GPU")


def test_backends_says_ok_or_why_not():
    table = medssm.backends()
    assert set(table) == set(OPS)
    for op, row in table.items():
        assert list(row) == ["reference", "native", "triton", "cuda"]
        assert row["reference"] == row["native"] == "ok"
        assert "\n" not in row["triton"] + row["cuda"] and min(len(row["triton"]), len(row["cuda"])) > 20, op


def test_explain_gives_every_reason():
    report = medssm.explain("selective_scan", *arguments())
    assert report["chosen"] == "native" and report["native"] == "ok" and "preferred" in report["reference"]
    meta = medssm.explain("selective_scan", *(t.to("meta") for t in arguments()))
    assert meta["chosen"] == "reference" and "meta" in meta["native"]
    with pytest.raises(ValueError, match="op: expected one of"):
        medssm.explain("scan", 1)


def test_on_a_gpu_the_table_of_thresholds_says_which_backend_is_asked_first(monkeypatch):
    class OnGpu:
        is_cuda = True

        def __init__(self, elements):
            self.numel = lambda: elements

    assert set(thresholds.FIRST) <= set(OPS) and all(rows[-1][0] == float("inf") for rows in thresholds.FIRST.values())
    assert dispatch._priority("an op that the table does not name", OnGpu(1)) == dispatch.PRIORITY
    for op in ("selective_scan", "selective_scan_nd"):  # by the counts of docs/gpu-predicted.md
        assert [dispatch._priority(op, OnGpu(elements))[:2] for elements in (2**22, 2**23)] == [("cuda", "triton"), ("triton", "cuda")]
    monkeypatch.setitem(thresholds.FIRST, "selective_scan", ((1000, "triton"), (float("inf"), "cuda")))
    assert dispatch._priority("selective_scan", OnGpu(1000)) == ("triton", "cuda", "native", "reference")
    assert dispatch._priority("selective_scan", OnGpu(1001)) == dispatch.PRIORITY
    assert dispatch._priority("selective_scan", torch.ones(1)) == dispatch.PRIORITY


def test_use_backend_is_a_context_manager_and_a_setter():
    assert chosen() == "native"
    with medssm.use_backend("reference"):
        assert chosen() == "reference"
        with medssm.use_backend("native"):
            assert chosen() == "native"
        assert chosen() == "reference"
    before = medssm.use_backend("reference")
    assert chosen() == "reference"
    before.__exit__()
    assert chosen() == "native"


def test_the_choice_is_thread_local():
    seen = []
    with medssm.use_backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(chosen()))
        worker.start()
        worker.join()
    assert seen == ["native"]


def test_a_preference_falls_back_with_one_logged_reason(caplog):
    dispatch._told.clear()
    with caplog.at_level(logging.WARNING, "medssm"), medssm.use_backend("cuda"):
        for _ in range(3):
            ops.selective_scan(*arguments())
    assert [r.message for r in caplog.records] == [f"selective_scan: cuda is not used: {medssm.backends()['selective_scan']['cuda']}"]


def test_strict_and_the_argument_raise():
    with medssm.use_backend("cuda", strict=True), pytest.raises(ValueError, match="backend='cuda' cannot serve this selective_scan: "):
        ops.selective_scan(*arguments())
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        ops.selective_scan(*arguments(), backend="triton")
    with pytest.raises(ValueError, match="backend: expected one of auto, cuda, triton, native, reference, got 'gpu'"):
        ops.selective_scan(*arguments(), backend="gpu")


def test_strict_ends_with_its_block_and_comes_back_after_an_inner_one():
    with medssm.use_backend("cuda"):
        with medssm.use_backend("cuda", strict=True), pytest.raises(ValueError, match="cannot serve"):
            ops.selective_scan(*arguments())
        ops.selective_scan(*arguments())  # falls back
    with medssm.use_backend("cuda", strict=True):
        with medssm.use_backend("native"):
            ops.selective_scan(*arguments())
        with pytest.raises(ValueError, match="cannot serve"):
            ops.selective_scan(*arguments())


def test_a_wrong_preference_and_an_error_inside_the_block_leave_the_choice_as_it_was():
    with pytest.raises(ValueError, match="backend: expected one of auto, cuda, triton, native, reference, got 'gpu'"):
        medssm.use_backend("gpu", strict=True)
    assert chosen() == "native"
    with pytest.raises(KeyError), medssm.use_backend("reference"):
        raise KeyError
    assert chosen() == "native"


def test_the_call_s_own_argument_comes_before_the_thread_s_choice():
    with medssm.use_backend("reference"):
        assert medssm.explain("selective_scan", *arguments(), backend="auto")["chosen"] == "native"
        assert medssm.explain("selective_scan", *arguments(), backend="native")["chosen"] == "native"
    report = medssm.explain("selective_scan", *arguments(), backend="reference")
    assert report["chosen"] == "reference" and report["reference"] == "ok" and report["native"] == "would serve; reference was preferred"
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this selective_scan: "):
        medssm.explain("selective_scan", *arguments(), backend="cuda")


def test_a_preference_of_the_environment_falls_back(monkeypatch):
    """A thread starts with it, and not with the strictness of the thread that started it."""
    monkeypatch.setenv("MEDSSM_BACKEND", "cuda")
    seen = []
    with medssm.use_backend("cuda", strict=True):
        worker = threading.Thread(target=lambda: seen.append(chosen()))
        worker.start()
        worker.join()
    assert seen == ["native"]


@pytest.fixture
def refusing(monkeypatch):
    """An op whose `cuda` refuses with the text that it is given, whose `triton` and `native` serve."""
    monkeypatch.setattr(dispatch, "_ops", {})
    monkeypatch.setattr(dispatch, "_told", set())
    serves = dispatch.Backend(lambda: None, lambda *_: None)
    for op in ("second", "first"):
        dispatch.register(op, cuda=dispatch.Backend(lambda: None, lambda text: text), triton=serves, native=serves)


def test_each_reason_of_each_op_is_logged_once(refusing, caplog):
    with caplog.at_level(logging.WARNING, "medssm"), medssm.use_backend("cuda"):
        for op, why in (("first", "a"), ("first", "b"), ("second", "a"), ("first", "a"), ("first", "b"), ("second", "a")):
            assert dispatch.choose(op, None, torch.ones(1), [why]) == "triton"
    assert [r.message for r in caplog.records] == [f"{op}: cuda is not used: {why}" for op, why in (("first", "a"), ("first", "b"), ("second", "a"))]


def test_a_choice_on_a_gpu_goes_by_the_table(refusing, monkeypatch):
    class OnGpu:
        is_cuda = True
        numel = staticmethod(lambda: 10)

    assert dispatch.choose("first", "auto", OnGpu(), [None]) == "cuda"
    monkeypatch.setitem(thresholds.FIRST, "first", ((10, "native"), (float("inf"), "triton")))
    assert dispatch.choose("first", "auto", OnGpu(), [None]) == "native"
    assert dispatch.choose("first", "auto", torch.ones(10), [None]) == "cuda"


def test_backends_are_listed_by_name(refusing):
    assert list(medssm.backends()) == ["first", "second"]


@pytest.mark.parametrize("value, expected", [("reference", "reference"), ("auto", "native")])
def test_the_environment_sets_the_preference(value, expected):
    code = "import torch, medssm; t = torch.ones(1, 2, 1); print(medssm.explain('selective_scan', t, t, -torch.ones(1, 1), t, t)['chosen'])"
    run = subprocess.run([sys.executable, "-c", code], env=_environment(MEDSSM_BACKEND=value), capture_output=True, text=True)
    assert run.stdout.strip() == expected, run.stderr


def test_a_wrong_environment_is_one_clear_error():
    run = subprocess.run([sys.executable, "-c", "import medssm"], env=_environment(MEDSSM_BACKEND="fast"), capture_output=True, text=True)
    assert "MEDSSM_BACKEND: expected one of auto, cuda, triton, native, reference, got 'fast'" in run.stderr


def test_import_works_without_the_library_and_says_so(tmp_path):
    code = (
        "import torch, medssm; t = torch.ones(1, 2, 1); medssm.ops.selective_scan(t, t, -torch.ones(1, 1), t, t);"
        "print(medssm.backends()['selective_scan']['native'])"
    )
    run = subprocess.run([sys.executable, "-c", code], env=_environment(MEDSSM_CPU_LIBRARY=str(tmp_path / "none.so")), capture_output=True, text=True)
    assert "no compiled library at" in run.stdout and "install again with a C++ compiler" in run.stdout, run.stderr
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    run = subprocess.run([sys.executable, "-c", code], env=_environment(MEDSSM_CPU_LIBRARY=str(broken)), capture_output=True, text=True)
    assert "does not load" in run.stdout, run.stderr


def test_import_stays_light():
    """What medssm imports beyond torch's own import: nothing heavy, and in little time."""
    code = "import torch, sys; before = set(sys.modules); import medssm; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    run = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not {"monai", "lightning", "matplotlib", "nibabel", "scipy", "rich"} & set(run.stdout.split()), run.stdout


def _environment(**changes):
    import os

    return {**{k: v for k, v in os.environ.items() if not k.startswith("MEDSSM_")}, **changes}


def _scan(x):
    B = x[..., :2]
    return medssm.ops.selective_scan(x, x.abs(), -torch.ones(3, 2), B, B)


def _gradient(function, checkpointed, thread=False, **options):
    x = torch.randn((1, 9, 3), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with medssm.use_backend("reference", strict=True):
        y = checkpoint(function, x, **options) if checkpointed else function(x)
    if thread:  # as autograd does for a GPU's tensors: its threads know nothing of this one's choice
        worker = threading.Thread(target=y.sum().backward)
        worker.start()
        worker.join()
    else:
        y.sum().backward()
    return x.grad


@pytest.mark.parametrize("thread", [False, True])
def test_a_checkpoint_recomputes_under_the_choice_of_its_forward(thread, monkeypatch):
    seen, real = [], OPS["selective_scan"].reference
    monkeypatch.setattr(OPS["selective_scan"], "reference", lambda **given: seen.append(1) or real(**given))
    want = _gradient(_scan, False)
    assert torch.equal(_gradient(_scan, True, thread, use_reentrant=False), want) and len(seen) == 3
    assert dispatch._choice.name == "auto"


def test_a_choice_inside_a_checkpoint_holds_for_what_it_encloses():
    def both(x):
        with medssm.use_backend("native"):
            y = _scan(x)
        return _scan(y)

    torch.testing.assert_close(_gradient(both, True, use_reentrant=False), _gradient(both, False))


def test_a_reentrant_checkpoint_recomputes_under_the_choice_of_its_backward():
    torch.testing.assert_close(_gradient(_scan, True, use_reentrant=True), _gradient(_scan, False))


def test_a_checkpoint_in_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: checkpoint(_scan, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_gradient(compiled, False), _gradient(_scan, False))
