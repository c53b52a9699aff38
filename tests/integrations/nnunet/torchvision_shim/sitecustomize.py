"""For tests on a CPU build of PyTorch, with this folder on PYTHONPATH. nnU-Net imports timm and timm torchvision, whose wheel is a CUDA build:
its library of operators does not load there, and registering their fake kernels fails. With two operators declared beforehand torchvision imports."""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")
_declared = []  # a library that is freed takes its operators with it


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
