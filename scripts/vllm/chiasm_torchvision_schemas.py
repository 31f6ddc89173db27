"""Lets torchvision be imported beside a torch that was built for the CPU.

The wheels of torchvision are built for CUDA. Beside a CPU build of torch their compiled part doesn't load, and the import
fails, since two operators of it have no schema. Resizing and normalising need none of them, and that is all that vLLM's
image processors do; so the schemas are declared just before torchvision is first imported.

``install.sh`` puts this file into the environment, with a .pth file that imports it when Python starts. Torch is imported
only with torchvision.
"""

import importlib.abc
import importlib.machinery
import sys

_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Loader(importlib.abc.Loader):
    """Torchvision's own loader, with the schemas declared before it runs."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        import torch

        if torch.version.cuda is None:  # else the compiled part loads, and declares them itself
            for operator in _OPERATORS:
                torch.library.define(f"torchvision::{operator}", _SIGNATURE)
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
