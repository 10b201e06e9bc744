"""What a file of weights is: its tensors' names say the layout, their shapes the model."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from stable_diffusion_tf.checkpoints import compvis, diffusers, keras_h5
from stable_diffusion_tf.checkpoints.fit import PartTable
from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.config import SD_1, SD_2, SD_2_BASE, ModelConfig


@dataclass(frozen=True)
class Layout:
    """Files with a tensor whose name fits `pattern` have the networks that `tables` gives."""

    pattern: str
    tables: Callable[[ModelConfig, TensorFile, bool], Mapping[str, PartTable]]


def _diffusers(*parts: str) -> Callable[..., Mapping[str, PartTable]]:
    return lambda config, file, ema: {part: diffusers.TABLES[part] for part in parts}


# The first that fits holds.
REFUSED = (
    (r"lora_|[._]lora\.|\.hada_w", "a LoRA, which changes a model and is none"),
    (r"^(string_to_param|emb_params)", "a textual inversion, which is a word and no model"),
    (r"^(control_model|controlnet_\w+)\.", "a ControlNet, which steers a model and is none"),
    (r"^(encoder|decoder)\.layers\.\d+\.(weight|conv\.)", "a tiny autoencoder (TAESD)"),
    (r"temporal|time_mixer|time_stack", "a video model"),
    (
        r"^conditioner\.|(^|\.)add_embedding\.|(input|down)_blocks\.[\w.]{,20}\.transformer_blocks\.1\.",
        "a Stable Diffusion XL model",
    ),
    (r"(label_emb|class_embedding)\.weight$", "the x4 upscaler or another model with labels"),
    (r"(label_emb|class_embedding)\.", "a Stable unCLIP model (variations of a picture)"),
    (r"joint_blocks\.|double_blocks\.|joint_transformer", "a diffusion transformer (SD 3, Flux)"),
)
LAYOUTS = (
    Layout(r"/(kernel|gamma|embeddings):0$", keras_h5.tables),
    Layout(r"^(model\.diffusion_model|model_ema)\.", compvis.tables),
    Layout(
        r"^first_stage_model\.",
        lambda config, file, ema: compvis.vae_tables(config, compvis.VAE),
    ),
    Layout(
        r"^(encoder\.down|decoder\.up)\.\d",
        lambda config, file, ema: compvis.vae_tables(config, ""),
    ),
    Layout(r"^(encoder\.down_blocks|decoder\.up_blocks)\.", _diffusers("encoder", "decoder")),
    Layout(r"^down_blocks\.", _diffusers("unet")),
    Layout(r"^(text_model\.)?encoder\.layers\.\d", _diffusers("text_encoder")),
)

BASES = {768: SD_1, 1024: SD_2_BASE}  # by the width of the text encoder's states
CONTEXT = re.compile(r"(attn2\.?to_k\.?|token_embedding\.)weight$")
CONV_IN = re.compile(
    r"((^|\.)input_blocks\.0\.0\.|diffusion_modelinput_blocks00|^conv_in\.)weight$"
)
INPUTS = {4: "", 9: "-inpainting"}
OTHER_INPUTS = {
    5: "the depth-to-image model",
    8: "an image-editing model such as InstructPix2Pix",
}


def find_layout(file: TensorFile) -> Layout:
    """The layout of a file.

    Raises:
        CheckpointError: it is something else, named if known.
    """
    names = file.names
    for pattern, what in REFUSED:
        if any(map(re.compile(pattern).search, names)):
            raise CheckpointError(
                f"{file.path} is {what}, which is not read. Give a model of Stable Diffusion 1.x "
                "or 2.x."
            )
    for layout in LAYOUTS:
        if any(map(re.compile(layout.pattern).search, names)):
            return layout
    raise CheckpointError(
        f"{file.path} holds {len(names)} tensors, the first is {names[0]!r}: no network of Stable "
        "Diffusion."
        if names
        else f"{file.path} holds no tensors."
    )


def find_config(files: Iterable[TensorFile], prediction: str | None) -> ModelConfig:
    """The published model whose sizes those of the files' tensors are; by default SD 1.x.

    Raises:
        CheckpointError: there is none.
    """
    width, channels = SD_1.unet.context_width, SD_1.unet.in_channels
    for file in files:
        context, inputs = _sizes(file)
        if context is not None and context not in BASES:
            raise CheckpointError(
                f"{file.path} is made for text of width {context}; Stable Diffusion 1.x has 768 "
                "and 2.x has 1024. If it is a model of your own, give its config."
            )
        if inputs is not None and inputs not in INPUTS:
            what = OTHER_INPUTS.get(inputs, "a model of another kind")
            raise CheckpointError(
                f"{file.path} takes {inputs} channels: it is {what}, which is not read."
            )
        width = context or width
        channels = inputs or channels
    return published(width, channels, prediction)


def published(context: int, channels: int, prediction: str | None) -> ModelConfig:
    """The model that files of these sizes are taken for; KeyError if there is none.

    Args:
        context: width of the text encoder's states, a key of `BASES`.
        channels: of the UNet's input, a key of `INPUTS`.
        prediction: what the UNet predicts, if anything says it.
    """
    base = BASES[context]
    if base is SD_2_BASE and prediction == "v" and channels == SD_2.unet.in_channels:
        base = SD_2
    return replace(
        base, name=base.name + INPUTS[channels], unet=replace(base.unet, in_channels=channels)
    )


def _sizes(file: TensorFile) -> tuple[int | None, int | None]:
    """Width of the text's states, channels of the UNet's input; None: these are not in the file."""
    context = inputs = None
    keras = LAYOUTS[0] is find_layout(file)
    part = keras_h5.part(file) if keras else None
    for name in file.names:
        shape = file.shape(name)
        if keras:
            if part == "unet" and len(shape) == 2 and shape[0] in BASES:
                context = context or shape[0]
            if part == "unet" and len(shape) == 4:
                inputs = inputs or shape[2]
            if part == "text_encoder" and name.endswith("embeddings:0"):
                context = shape[-1]
        elif len(shape) == 2 and CONTEXT.search(name):
            context = context or shape[1]
        elif len(shape) == 4 and CONV_IN.search(name):
            inputs = shape[1]
    return context, inputs
