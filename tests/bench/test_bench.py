"""The benchmark: peers compute what we compute, goals are read off a run, a quick run writes its files. No times are asserted."""

import json
import time
from pathlib import Path

import pytest
import torch

from medssm import bench, cli, machine, nn, ops
from medssm.bench import convolutions, goals, measure, networks, page, peers, report, scans
from medssm.bench.network_goals import network_goals
from medssm.nn.mixers import MIXERS


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_computes_the_same(name):
    if not peers.installed(name):
        pytest.skip(f"{name} is not installed")
    tensors = {k: t.double() for k, t in scans.scan_inputs(2, 5, 70, 3).items()}
    want = ops.selective_scan(**tensors, delta_softplus=True, backend="reference")
    got = peers.PEERS[name](**scans.channel_first(tensors)).transpose(1, 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("make", [lambda: scans._six_orders(5, 8), lambda: scans._low_rank(4, 8, 2), lambda: scans._depthwise(6, 8)])
def test_the_sides_of_a_row_do_the_same_work(make):
    ours, *others = (side() for side in make().values())
    for other in others:
        other = other if other.shape == ours.shape else other.movedim(1, -1)
        torch.testing.assert_close(ours, other.reshape(ours.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [lambda grad: convolutions._one(1, (4, 6), 3, 6, grad), lambda grad: convolutions._one(2, (4, 6), 1, 6, grad)])
@pytest.mark.parametrize("grad", [False, True])
def test_both_sides_of_a_convolution_do_the_same_work(make, grad):
    ours, theirs = (side() for side in make(grad).values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_goals_are_ratios_of_a_run():
    def t(x):
        return {"median": x, "min": x, "calls": 1}

    family = ("delta", "gated-delta", "kda", "gdn2")
    results = {
        "threads": 2,
        "extra": {"overhead_us": 9.0, "checkpoint_share": 0.25},
        "rows": {
            "scan": {"times": {"1": {"medssm": t(1.0), "ceiling": t(0.9), "two-level": t(70.0)}, "2": {"medssm": t(0.5)}}},
            "scan-long": {"times": {"1": {"medssm": t(64 * 1.5)}}},
            "delta": {"times": {"1": {"medssm": t(1.0), "onnxruntime": t(2.5)}}},
            "gla": {"times": {"1": {"medssm": t(1.0), "chunked PyTorch": t(3.0), "onnxruntime": t(4.0)}}},
            "gla-keys": {"times": {"1": {"medssm": t(1.0), "chunked PyTorch": t(9.0)}}},
            "kda": {"times": {"1": {"medssm": t(1.2), "medssm, gated delta rule": t(1.0)}}},
            **{f"{name}-train": {"times": {"1": {"medssm": t(4.0 + i), "medssm, forward alone": t(1.0)}}} for i, name in enumerate(family)},
        },
    }
    found = {g.name: g for g in goals.judge(results)}
    assert found["forward over the ceiling micro-kernel"].met and found["forward, two-level / ours"].met
    assert found["all threads over one, forward"].reached == "2" and found["all threads over one, forward"].met
    assert found["262,144 tokens: time per token against 4,096"].reached == "1.5" and not found["262,144 tokens: time per token against 4,096"].met
    assert not found["call overhead without gradients, microseconds"].met
    assert found["forward, mamba_ssm reference / ours"].met is None
    assert found["delta_rule: onnxruntime / ours, forward"].reached == "2.5"
    assert found["gated_linear_attention, decay per head: the best peer / ours, forward"].reached == "3"
    assert found["gated_linear_attention, decay per key: the best peer / ours, forward"].met is None  # which may be the one that is missing
    assert found["delta_rule, KDA / a decay per head, forward"].reached == "1.2"
    assert found["delta_rule, all four: backward / forward, the slowest"].reached == "6"


def test_figures_of_another_machine_are_not_kept(tmp_path):
    here = {
        "machine": {"processor": "CPU", "cores": "2", "threads": "2", "GPU": "none", "torch": "2", "medssm": "1.0 (compiled, instruction set v4)"}
    }
    (tmp_path / "results.json").write_text(json.dumps(here))
    newer, other = (
        {"machine": here["machine"] | {"medssm": text}} for text in ("1.1 (compiled, instruction set v4)", "1.0 (compiled, instruction set v3)")
    )
    assert bench._earlier(tmp_path, "results.json", newer) == here
    assert bench._earlier(tmp_path, "results.json", other) == {}  # the host gives both processors one name
    assert bench._earlier(tmp_path, "results.json", {"machine": here["machine"] | {"threads": "1"}}) == {}


def test_a_page_has_the_goals_that_were_measured():
    about = {"date": "", "commit": "", "machine": {"processor": "", "cores": 2, "medssm": "", "torch": ""}, "rows": {}}
    found = [goals.Goal("a", "at least 2", "3", True), goals.Goal("b", "at least 2", "1", False), goals.Goal("c", "at least 2", "not measured", None)]
    page = report.markdown({**about, "goals": [goal._asdict() for goal in found]})
    assert "| a | at least 2 | 3 | met |" in page and "| b | at least 2 | 1 | **missed** |" in page and "| c |" not in page
    assert "Not installed" not in page and "Not installed: onnxruntime." in report.markdown({**about, "absent": ["onnxruntime"]})
    assert "goal" not in report.markdown({**about, "goals": [found[2]._asdict()]})


def test_the_limit_is_for_other_sides_and_forgives_a_slow_first_call(monkeypatch):
    """The first call of a side may take long: it sets up what is kept."""
    monkeypatch.setattr(measure, "_TURN", 0)
    called: dict[str, int] = {}

    def side(name, first, later):
        def call():
            called[name] = called.get(name, 0) + 1
            return first if called[name] == 1 else later

        return call

    monkeypatch.setattr(measure, "_time", lambda side: side())
    taken = measure.times({"medssm": side("medssm", 9, 9), "slow": side("slow", 9, 9), "warm": side("warm", 9, 1)}, 0, 1, limit=2)
    assert {name: figures["calls"] for name, figures in taken.items()} == {"medssm": 3, "slow": 1, "warm": 3}


def test_a_quick_run_writes_its_files(tmp_path):
    assert cli.main(["bench", "--quick", "--quiet", "--out", str(tmp_path), "--rows", "depthwise"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    sides = results["rows"]["depthwise"]["times"]["1"]
    assert set(sides) == {"medssm", "PyTorch, channels_last_3d"} and all(s["min"] > 0 for s in sides.values())
    assert results["commit"] and results["machine"]["torch"]
    assert "depthwise_conv" in (tmp_path / "results.md").read_text()


def test_an_unknown_row_is_one_line(capsys):
    assert cli.main(["bench", "--rows", "nothing*"]) == 2
    assert "--rows: expected a pattern of scan" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_network_on_every_way(tmp_path, capsys):
    assert cli.main(["bench", "--networks", "ultralight*", "--quick", "--compiled", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "networks.json").read_text())["networks"]["ultralight_vmunet"]
    bf16 = {"native, bf16"} if machine.has_bf16() else set()
    assert set(figures["inference"]) == {"native", "native, compiled", "upstream's arithmetic in PyTorch", *bf16}
    assert set(figures["small"]["training"]) == {"native", "upstream's arithmetic in PyTorch"}
    assert figures["ops"] == ["causal_conv1d", "selective_scan"] and figures["training_input"] == figures["input"]
    assert figures["multiply_adds"] > 1e6 and figures["parameters"] == 49_484 and figures["memory"] > 0
    assert "ultralight_vmunet: native" in capsys.readouterr().out and "| ultralight_vmunet |" in (tmp_path / "networks.md").read_text()
    assert cli.main(["bench", "--networks", "ultralight*", "--quick", "--resume", "--out", str(tmp_path)]) == 0
    assert (
        "native" not in capsys.readouterr().out and json.loads((tmp_path / "networks.json").read_text())["networks"]["ultralight_vmunet"] == figures
    )


@pytest.mark.thorough
def test_a_mixer_measured_into_the_docs(tmp_path, capsys):
    before = f"text\n{page.BEGIN}\nold\n{page.END}\nmore\n"
    (tmp_path / "mixers.md").write_text(before)
    command = ["bench", "--quick", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "mixers.md"), "--mixers"]
    assert cli.main([*command, "linear*"]) == 0 and cli.main([*command, "ss_nd"]) == 0
    found = json.loads((tmp_path / "out" / "mixers.json").read_text())
    assert list(found["mixers"]) == ["ss_nd", "linear_attention"]  # the first stays, in the order of the table
    figures = found["mixers"]["linear_attention"]
    assert figures["inference"]["median"] > 0 and figures["training"]["median"] > 0 and figures["parameters"] > 1000
    after = (tmp_path / "mixers.md").read_text()
    assert after == page.filled(before, found) and "| `linear_attention` |" in after and after.startswith("text\n") and after.endswith("\nmore\n")
    assert "old" not in after and "linear_attention: inference" in capsys.readouterr().out


def test_the_docs_have_the_measured_table():
    root = Path(__file__).parents[2]
    text, results = (root / "docs" / "mixers.md").read_text(), root / "bench" / "results" / "mixers.json"
    if results.is_file():
        assert page.filled(text, json.loads(results.read_text())) == text
    assert all(f"| `{name}`" in text for name in MIXERS)


def test_mixers_that_are_not_there_are_one_line(capsys):
    assert cli.main(["bench", "--mixers", "conv*"]) == 2
    assert "--mixers: expected a pattern of ss_nd, linear_attention" in capsys.readouterr().err
    assert cli.main(["bench", "--mixers", "--docs", "x.md"]) == 2
    assert "--docs: goes with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mixer", [nn.Mamba(8), nn.TriMamba(8, slices=3), nn.SSND(8, spatial_dims=3), nn.LiteMLA(8, dim=4, spatial_dims=3).eval(), nn.SpatialMix(8)]
)
def test_networks_compute_the_same_in_pytorch(mixer):
    x = torch.randn(2, 3, 4, 5, 8)
    with torch.no_grad():
        ours = mixer(x)
        with peers.in_pytorch():
            torch.testing.assert_close(mixer(x), ours, rtol=1e-3, atol=1e-4)
        assert torch.equal(mixer(x), ours)


@pytest.mark.parametrize("kernel", [(3,), (3, 1), (3, 5, 1)])
def test_depthwise_convolutions_are_the_same_in_pytorch(kernel):
    x, weight, bias = torch.randn(2, *(4, 5, 6)[: len(kernel)], 3), torch.randn(3, *kernel), torch.randn(3)
    ours = ops.depthwise_conv(x, weight, bias, "silu")
    with peers.in_pytorch():
        torch.testing.assert_close(ops.depthwise_conv(x, weight, bias, "silu"), ours)


def test_eager_attention_is_pytorchs():
    q, k, v, mask = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6), torch.randn(5, 7)
    for options in ({}, {"attn_mask": mask}, {"scale": 0.3}, {"dropout_p": 0.0}):
        torch.testing.assert_close(peers.eager_attention(q, k, v, **options), torch.nn.functional.scaled_dot_product_attention(q, k, v, **options))
    assert not peers.eager_attention(q, k, v, dropout_p=1.0).any()


def test_goals_of_networks_follow_from_the_ops_that_they_call():
    def figures(ours, theirs, bf16, *ops, small=None):
        sides = {networks.NATIVE: ours, networks.BF16: bf16, networks.PYTORCH: theirs}
        return {"ops": list(ops), "inference": {side: {"median": t} for side, t in sides.items() if t}, "small": small}

    small = {"inference": {networks.NATIVE: {"median": 1.0}, networks.PYTORCH: {"median": 4.0}}}
    found = network_goals(
        {
            "light": figures(1.0, 0.98, 1.02, "depthwise_conv"),
            "linear": figures(1.0, 1.4, 1.1, "linear_attention"),
            "scan": figures(1.0, None, 0.5, "selective_scan_nd", "linear_attention", small=small),
        }
    )
    assert [(goal.wanted, goal.reached, goal.met) for goal in found] == [
        ("at least 1", "0.98", True),
        ("at most 1", "1.02", True),
        ("at least 1.5", "1.4", False),
        ("at most 1", "1.1", False),
        ("at least 3", "4", True),
        ("at most 1", "0.5", True),
    ]
    assert found[4].name == "scan: upstream's arithmetic in PyTorch / ours, small input"


def test_a_side_that_takes_long_is_called_once():
    calls = []
    found = measure.times({"slow": lambda: (calls.append(1), time.sleep(0.01)), "fast": lambda: None}, 0.01, 1, once=0.005)
    assert len(calls) == found["slow"]["calls"] == 1 and found["slow"]["min"] > 0.005 and found["fast"]["calls"] > 1


def test_a_table_goes_on_behind_what_fails_and_is_resumed(tmp_path, monkeypatch, capsys):
    broken, measured = {"unext"}, []

    def network(name, quick, compiled):
        measured.append(name)
        if name in broken:
            raise RuntimeError(f"bench: {name} ended with status 1")
        way = {"native": {"median": 1.0 if quick else 2.0}}
        return {"input": [1, 3, 64, 64], "inference": way, "training": way, "small": None, "ops": []}

    monkeypatch.setattr("medssm.bench.networks.network", network)
    table = ["bench", "--networks", "un*", "--resume", "--out", str(tmp_path)]
    assert cli.main([*table, "--quick"]) == 2 and measured == ["unetr_pp", "unext"]
    assert "not measured: unext; --resume measures them alone" in capsys.readouterr().err
    broken.clear(), measured.clear()
    assert cli.main([*table, "--quick"]) == 0 and measured == ["unext"]
    measured.clear()
    assert cli.main(table) == 0 and measured == ["unetr_pp", "unext"]  # quick figures are no full ones
    figures = json.loads((tmp_path / "networks.json").read_text())["networks"]
    assert [each["inference"]["native"]["median"] for each in figures.values()] == [2.0, 2.0]
    measured.clear()
    assert cli.main(table) == 0 and measured == []
