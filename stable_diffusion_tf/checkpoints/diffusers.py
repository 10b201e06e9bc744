"""The layout of github.com/huggingface/diffusers: `model_index.json` and one folder a part.

text_encoder/model.safetensors                      CLIPTextModel of transformers
unet/diffusion_pytorch_model.safetensors            UNet2DConditionModel
vae/diffusion_pytorch_model.safetensors             AutoencoderKL: encoder and decoder

Each may be PyTorch's `.bin` instead, or an index (`.index.json`) of several files.
"""

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from stable_diffusion_tf.checkpoints.config_json import read_config
from stable_diffusion_tf.checkpoints.fit import Checkpoint, Table
from stable_diffusion_tf.checkpoints.tensors import open_tensors

log = logging.getLogger(__name__)

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
OLD_FILES = FILES | {"text_encoder": "text_encoder/pytorch_model"}  # of PyTorch's format
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
VARIANTS = (None, "fp16")  # those that are taken without being asked for
JSON_FILES = (
    "model_index.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
TOKENIZER_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json")


def find_weights(
    part: str, exists: Callable[[str], bool], variants: Iterable[str | None] = VARIANTS
) -> str | None:
    """Of the files in a folder, the one with the weights of `part`: its path in the folder.

    The first of the `variants` that is there, of it safetensors before PyTorch's files.
    """
    names = (
        (OLD_FILES if ending.startswith(".bin") else FILES)[part] + _ending(ending, variant)
        for variant in variants
        for ending in ENDINGS
    )
    return next(filter(exists, names), None)


def find_all(
    exists: Callable[[str], bool], variant: str | None = None
) -> tuple[dict[str, str | None], list[str]]:
    """Each part's weights in a folder in which these files exist, and what the folder lacks.

    As in diffusers, a part without the `variant` has its plain file, if another part has it.
    """

    def found(*variants: str | None) -> dict[str, str | None]:
        return {part: find_weights(part, exists, variants) for part in FILES}

    names = found(*VARIANTS) if variant is None else found(variant)
    if variant is not None and any(names.values()):
        plain = {part: name for part, name in found(None).items() if name and not names[part]}
        if plain:
            taken = ", ".join(dict.fromkeys(plain.values()))
            log.warning("not every network has the variant %r; taken without: %s", variant, taken)
        names |= plain
    missing = [name for name in JSON_FILES if not exists(name)]
    absent = dict.fromkeys(FILES[part] for part, name in names.items() if name is None)
    return names, missing + [stem + _ending(ENDINGS[0], variant) for stem in absent]


def open_folder(folder: str | os.PathLike, variant: str | None = None) -> Checkpoint:
    """Open a folder: its config and its files' headers are read and checked, no weights yet.

    Args:
        folder: what has a `model_index.json`.
        variant: such as "fp16": which of the weights to take, where a part has them; None: those
            of no variant, else fp16.

    Raises:
        FileNotFoundError: files are missing; all of them are named.
        CheckpointError: a file is not what it should be, or the model is of another architecture.
    """
    folder = Path(folder)

    def exists(name: str) -> bool:
        return (folder / name).exists()

    names, missing = find_all(exists, variant)
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a whole model in the diffusers layout: {', '.join(missing)} missing; "
            "download the whole folder."
        )
    config = read_config(folder)
    files = {name: open_tensors(folder / name) for name in dict.fromkeys(names.values())}
    return Checkpoint(
        config, {part: partial(TABLES[part].match, file=files[names[part]]) for part in FILES}
    )


def _ending(ending: str, variant: str | None) -> str:
    """A variant stands before the last suffix: `.fp16.bin`, `.bin.index.fp16.json`."""
    before, _, suffix = ending.rpartition(".")
    return f"{before}.{variant}.{suffix}" if variant else ending
