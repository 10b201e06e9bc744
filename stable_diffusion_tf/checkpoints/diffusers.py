"""The layout of github.com/huggingface/diffusers: `model_index.json` and one folder a part.

text_encoder/model.safetensors                      CLIPTextModel of transformers
unet/diffusion_pytorch_model.safetensors            UNet2DConditionModel
vae/diffusion_pytorch_model.safetensors             AutoencoderKL: encoder and decoder
"""

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from stable_diffusion_tf.checkpoints.config_json import read_config
from stable_diffusion_tf.checkpoints.fit import Match, Table, match
from stable_diffusion_tf.checkpoints.readers import TensorFile, open_tensors

# PyTorch names a layer's array `weight` whatever it is, and puts the output axis first.
SUFFIXES = {
    "kernel": "weight",
    "gamma": "weight",
    "embeddings": "weight",
    "bias": "bias",
    "beta": "bias",
}
AXES = {
    ("kernel", 2): (1, 0),  # (out, in) -> (in, out)
    ("kernel", 4): (2, 3, 1, 0),  # (out, in, h, w) -> (h, w, in, out)
}
# Until 2023 the autoencoder's attention had names of its own, as 1x1 convolutions earlier still.
ATTENTION = r"(mid_block\.attentions\.0\.)"
OLD_ATTENTION = (
    (ATTENTION + r"query\.", r"\1to_q."),
    (ATTENTION + r"key\.", r"\1to_k."),
    (ATTENTION + r"value\.", r"\1to_v."),
    (ATTENTION + r"proj_attn\.", r"\1to_out.0."),
)
TABLES = {
    "text_encoder": Table(
        SUFFIXES,
        AXES,
        prefix="text_model.",
        aliases=((r"^(?!text_model\.)", "text_model."),),  # newer transformers leave it out
        ignored=(
            r"(^|\.)position_ids$",
            r"^text_projection(\.|$)",
            r"^logit_scale$",
            r"^(vision_model|visual_projection)\.",
        ),
    ),
    "unet": Table(SUFFIXES, AXES),
    "encoder": Table(
        SUFFIXES,
        AXES,
        aliases=OLD_ATTENTION,
        ignored=(r"^decoder\.", r"^post_quant_conv\."),
        pointwise=ATTENTION + r"to_.*weight$",
    ),
    "decoder": Table(
        SUFFIXES,
        AXES,
        aliases=OLD_ATTENTION,
        ignored=(r"^encoder\.", r"^quant_conv\."),
        pointwise=ATTENTION + r"to_.*weight$",
    ),
}
FILES = {
    "text_encoder": "text_encoder/model",
    "unet": "unet/diffusion_pytorch_model",
    "encoder": "vae/diffusion_pytorch_model",
    "decoder": "vae/diffusion_pytorch_model",
}
ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors")
OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pt")
JSON_FILES = (
    "model_index.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
TOKENIZER_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json")


def find_weights(part: str, exists: Callable[[str], bool]) -> str | None:
    """Of the files in a folder, the one with the weights of `part`: its path in the folder."""
    return next(filter(exists, (FILES[part] + ending for ending in ENDINGS)), None)


def missing_files(exists: Callable[[str], bool]) -> list[str]:
    """What a folder lacks in which these files exist."""
    found = {stem: find_weights(part, exists) for part, stem in FILES.items()}
    missing = [name for name in JSON_FILES if not exists(name)]
    return missing + [stem + ENDINGS[0] for stem, name in found.items() if name is None]


class DiffusersFolder:
    """An opened folder: its config and its files' headers are read and checked, no weights yet.

    Raises:
        FileNotFoundError: files are missing; all of them are named.
        CheckpointError: a file is not what it should be, or the model is of another architecture.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if missing := missing_files(self._exists):
            raise FileNotFoundError(
                f"{self.folder} is not a whole model in the diffusers layout: "
                f"{', '.join(missing)} missing{self._other_weights()}."
            )
        self.config = read_config(self.folder)
        self._files: dict[str, TensorFile] = {
            part: open_tensors(self.folder / find_weights(part, self._exists)) for part in FILES
        }

    def match(self, part: str, variables: Sequence[Any]) -> list[Match]:
        """The tensor for each variable of `part`; CheckpointError unless all of them fit."""
        return match(variables, self._files[part], TABLES[part])

    def _exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _other_weights(self) -> str:
        paths = chain(self.folder.glob("*"), self.folder.glob("*/*"))  # not all of a home or disk
        other = next((path.name for path in paths if path.suffix in OTHER_WEIGHTS), None)
        if other is None:
            return "; download the whole folder"
        return f" (weights like {other} are not read; convert them to safetensors)"
