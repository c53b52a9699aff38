"""AOTInductor's packages: PyTorch's numbers in a process without medssm, one clear error where that cannot be."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from medssm.compress.int8 import quantize
from medssm.errors import UserError
from medssm.export.aoti import _is_made_here, to_aoti
from tests.export.test_onnx import small

RUN = """
import sys, numpy, torch
run = torch._inductor.aoti_load_package("net.pt2")
numpy.save("found.npy", run(torch.from_numpy(numpy.load("image.npy"))).numpy())
print("medssm" in sys.modules)
"""


@pytest.mark.thorough
def test_a_package_runs_in_a_process_without_medssm(tmp_path):
    network, image = small("linear_attention"), torch.randn(3, 1, 21, 35)
    result = to_aoti(network, tmp_path / "net.pt2", (1, 1, 16, 16), properties={"medssm": "text"})
    assert result["error"] < 1e-4 and _is_made_here(tmp_path / "net.pt2")
    np.save(tmp_path / "image.npy", image.numpy())
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
    want = network(image).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), want, atol=1e-4 * np.ptp(want), rtol=0)


def test_8_bits_are_refused(tmp_path):
    with pytest.raises(UserError, match="AOTInductor would compute 8-bit layers in floating point: export the network as it was before"):
        to_aoti(
            quantize(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), [torch.randn(1, 1, 8, 8)], layers="all")[0], tmp_path / "net.pt2", (1, 1, 16, 16)
        )
    assert not list(tmp_path.iterdir())


def test_an_operator_without_a_portable_form_is_named(tmp_path):
    with pytest.raises(UserError, match="selective_scan_nd has no portable form"):
        to_aoti(small(), tmp_path / "net.pt2", (1, 1, 16, 16))
    assert not list(tmp_path.iterdir())
