"""Makes torchvision importable with a build of torch for CPUs.

The wheels of torchvision are built for CUDA. With a CPU build of torch their compiled part doesn't load, and the import fails
because the schemas of two operators are missing. vLLM's image processors only resize and normalise, and don't use these
operators. So this module declares the schemas just before torchvision is first imported.

``install.sh`` copies this file into the environment, with a .pth file that imports it when Python starts. It doesn't import
torch until torchvision is imported.
"""

import importlib.abc
import importlib.machinery
import sys

_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Loader(importlib.abc.Loader):
    """Declares the schemas, then runs torchvision's own loader."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        import torch

        if torch.version.cuda is None:  # a CUDA build loads the compiled part, which declares them itself
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
