"""A volume over several ranks: every rank computes its part of what one process computes, forward and backward. One start serves all checks."""

import pytest

from tests.parallel.ranks import run

SCANS = ["selective_scan", "ssd", "gated_linear_attention", "delta_rule", "causal_conv1d", "linear_attention", "selective_scan_nd", "bi_wkv"]
NETWORKS = ["networks", "deep_supervision", "inference"]


def test_two_ranks_compute_what_one_process_does(tmp_path):
    run(2, [*SCANS, "depthwise_conv", "shifts", "layers", *NETWORKS, "other_axes", "errors", "late"], tmp_path)


@pytest.mark.thorough
def test_four_ranks_compute_what_one_process_does(tmp_path):
    """There are ranks between the first and the last of a walk: their decays count too."""
    run(4, [*SCANS, "depthwise_conv", "shifts", *NETWORKS, "other_axes_of_every_mixer"], tmp_path)
