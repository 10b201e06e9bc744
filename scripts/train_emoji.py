"""Trains the embedded default model, weights/emoji, from emoji artwork: two stages and an export.

    scripts/train_emoji.py autoencoder     # pictures <-> latents
    scripts/train_emoji.py diffusion       # text -> latents, text encoder trained along
    scripts/train_emoji.py export          # the averaged weights, as a folder to load

Each stage can be killed at any moment and run again: it goes on from its last save.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from dataclasses import replace
from pathlib import Path

import click
import emoji_data
import keras
import numpy as np

from stable_diffusion_tf.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion_tf.images import sheet
from stable_diffusion_tf.models import Decoder, Encoder
from stable_diffusion_tf.training.loop import random, shuffled, train
from stable_diffusion_tf.training.loss import autoencoder_loss

EMOJI = ModelConfig(
    name="emoji",
    text_encoder=TextEncoderConfig(width=128, layers=3, heads=4, mlp_width=512),
    unet=UNetConfig(
        widths=(64, 192, 256),
        resnets=1,
        attention=(False, True, True),
        heads=(2, 6, 8),
        context_width=128,
        groups=16,
    ),
    autoencoder=AutoencoderConfig(widths=(16, 48, 96), resnets=1, groups=8, scale=1.0),
    schedule=ScheduleConfig(
        prediction="v", spacing="trailing", final_alpha_one=True, zero_terminal_snr=True
    ),
    image_size=64,
    guidance=3.0,
)
