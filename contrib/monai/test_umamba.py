# Copyright (c) MONAI Consortium
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import unittest
from unittest import skipUnless

import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.networks import eval_mode
from monai.utils import optional_import
from parameterized import parameterized
from umamba import UMamba  # in MONAI: from monai.networks.nets import UMamba

_, has_medssm = optional_import("medssm")

device = "cuda" if torch.cuda.is_available() else "cpu"

TEST_CASES = []
for spatial_dims in (2, 3):
    for variant in ("enc", "bot"):
        for size in (16, 19):
            TEST_CASES.append(
                [
                    {"spatial_dims": spatial_dims, "in_channels": 2, "out_channels": 3, "variant": variant, "features": (4, 8, 8)},
                    (1, 2, *[size] * spatial_dims),
                    (1, 3, *[size] * spatial_dims),
                ]
            )
for norm, act in (("batch", "relu"), (("group", {"num_groups": 2}), ("prelu", {"init": 0.2}))):
    TEST_CASES.append(
        [{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (4, 8), "norm": norm, "act": act}, (2, 1, 16, 16), (2, 2, 16, 16)]
    )
TEST_CASES.append(
    [
        {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 2,
            "features": (4, 8, 8),
            "strides": (1, (1, 2, 2), 2),
            "kernel_size": ((1, 3, 3), 3, 3),
            "num_blocks": (1, 1, 2),
            "num_decoder_blocks": 1,
        },
        (1, 1, 8, 16, 20),
        (1, 2, 8, 16, 20),
    ]
)

SMALL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (16, 16, 16)}


@skipUnless(has_medssm, "Requires medssm")
class TestUMamba(unittest.TestCase):
    @parameterized.expand(TEST_CASES)
    def test_shape(self, input_param, input_shape, expected_shape):
        net = UMamba(**input_param).to(device)
        with eval_mode(net):
            self.assertEqual(net(torch.randn(input_shape).to(device)).shape, expected_shape)

    @parameterized.expand([("enc",), ("bot",)])
    def test_backward(self, variant):
        net = UMamba(**SMALL, variant=variant).to(device)
        net(torch.randn(1, 1, 16, 16, 16).to(device)).square().mean().backward()
        self.assertTrue(all(p.grad is not None for p in net.parameters()))

    def test_deep_supervision(self):
        net = UMamba(**SMALL, deep_supervision=True).to(device)
        x = torch.randn(1, 1, 16, 16, 16).to(device)
        self.assertEqual([tuple(out.shape) for out in net.train()(x)], [(1, 2, 16, 16, 16), (1, 2, 8, 8, 8)])
        with eval_mode(net):
            self.assertEqual(net(x).shape, (1, 2, 16, 16, 16))

    def test_meta_tensor_in_sliding_windows(self):
        net = UMamba(**SMALL).to(device)
        x = MetaTensor(torch.randn(1, 1, 24, 16, 16), affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))).to(device)
        with eval_mode(net):
            out = sliding_window_inference(x, 16, 2, net)
        self.assertIsInstance(out, MetaTensor)
        self.assertTrue(torch.equal(out.affine, x.affine))

    def test_ill_arg(self):
        with self.assertRaises(ValueError):
            UMamba(spatial_dims=1, in_channels=1, out_channels=2)
        with self.assertRaises(ValueError):
            UMamba(spatial_dims=3, in_channels=1, out_channels=2, variant="decoder")
        with self.assertRaises(ValueError):
            UMamba(spatial_dims=3, in_channels=1, out_channels=2, features=(4, 8), strides=(1, 2, 2))


if __name__ == "__main__":
    unittest.main()
