"""Stable Diffusion as Keras 3 models.

The public names are loaded at first use: `import stable_diffusion_tf` imports no backend.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Keras reads the first once, when it is imported, TensorFlow the others at its first tensor: memory
# that it needs again and again it then keeps, as it does with oneDNN, up to a terabyte.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "1")
os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(2**20))

if TYPE_CHECKING:
    from stable_diffusion_tf.checkpoints.hub import DownloadError as DownloadError
    from stable_diffusion_tf.checkpoints.readers import CheckpointError as CheckpointError
    from stable_diffusion_tf.pipeline import StableDiffusion as StableDiffusion

_MODULES = {
    "CheckpointError": "checkpoints.readers",
    "DownloadError": "checkpoints.hub",
    "StableDiffusion": "pipeline",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
