"""What CALVIN imports and cannot be had today, made when it is asked for; installed as sitecustomize.py of its environment only.

pyhash does not build any more: the one hash that is used, 32-bit FNV-1, comes from the package fnvhash. A torchvision built for CUDA beside a torch without it lacks its compiled operators, of which CALVIN uses none."""
import importlib.abc
import importlib.machinery
import sys
import types


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "pyhash": return importlib.machinery.ModuleSpec(name, self)
        if name == "torchvision" and "torchvision" not in sys.modules: operators()

    def create_module(self, spec): return types.ModuleType(spec.name)

    def exec_module(self, module):
        import fnvhash
        module.fnv1_32 = lambda: lambda text: fnvhash.fnv1_32(text.encode())


def operators():
    "Declare the two operators that torchvision describes on import, if this torch has no CUDA and so cannot load them."
    import torch
    if torch.version.cuda: return
    global library
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in "nms", "qnms":
        try: library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError: pass   # there: a torchvision that fits


sys.meta_path.insert(0, Stand())
