"""Stable Diffusion as Keras 3 models.

The public names are loaded at first use: `import stable_diffusion_tf` imports no backend.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Keras reads its backend once, when it is imported. TensorFlow, too, reads then whether to use its
# oneDNN operations, which it leaves off on some CPUs where they are the faster ones: with AVX2
# alone. It reads the others at its first tensor: from then on it keeps the memory that it has had,
# as new pages cost a tenth of a step, and takes whatever there is (a terabyte, in MB, not 64 GB).
if os.environ.setdefault("KERAS_BACKEND", "tensorflow") == "tensorflow":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
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
