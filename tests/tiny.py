"""The tiny model of the goldens, and folders in the diffusers layout made of stand-in weights."""

import json

from stable_diffusion_tf.checkpoints.config_json import write_config
from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.config import (
    AutoencoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
)

TINY = ModelConfig(
    name="tiny",
    text_encoder=TextEncoderConfig(width=32, layers=3, heads=4, mlp_width=64),
    unet=UNetConfig(
        widths=(32, 64), resnets=1, attention=(True, False), heads=(4, 4), context_width=32
    ),
    autoencoder=AutoencoderConfig(widths=(32, 64), resnets=1),
    image_size=32,
    guidance=3.0,
)
FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def write_folder(folder, config, weights):
    """A folder of `weights` {part: {name: array}}, as published."""
    for name, values in write_config(config).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    for part, tensors in weights.items():
        save_safetensors(tensors, folder / FILES[part])
    return folder
