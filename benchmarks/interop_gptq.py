"""stub"""
import sys, types
def import_gptqmodel():
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms.functional"].InterpolationMode = None
    import gptqmodel  # noqa: F401
