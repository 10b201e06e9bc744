"""Saves MODEL with the autoencoder of OTHER as TARGET, a folder to train on from, in float16.

The new latents mean other things to its UNet. Its first and its last convolution are turned by the
rotation that brings latents of emoji artworks nearest to what they were (orthogonal Procrustes:
Schönemann 1966), so that it is not lost in them; training does the rest.
"""

from dataclasses import replace
from pathlib import Path

import stable_diffusion_tf  # noqa: F401 - before Keras: it chooses what Keras runs on, and how

# isort: split
import click
import emoji_data
import numpy as np

from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.load import MODELS, Models, load_parts
from stable_diffusion_tf.checkpoints.save import check_target, save
from stable_diffusion_tf.cli import errors_in_one_line
from stable_diffusion_tf.training.data import posterior


def rotation(latents: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The orthogonal matrix r for which `latents @ r` is nearest to `wanted`; (..., C) both."""
    channels = latents.shape[-1]
    u, _, v = np.linalg.svd(latents.reshape(-1, channels).T @ wanted.reshape(-1, channels))
    return u @ v


def turn(unet, r: np.ndarray) -> None:
    """Makes the UNet see latents `x @ r` in x, and answer in x's terms: white noise stays white."""
    first, last = unet.get_layer("conv_in"), unet.get_layer("conv_out")
    first.kernel.assign(np.einsum("ji,hwio->hwjo", r, first.kernel))
    last.kernel.assign(np.einsum("hwio,jo->hwij", last.kernel, r))
    last.bias.assign(np.einsum("o,jo->j", last.bias, r))


@click.command(help=__doc__)
@click.argument("model")
@click.argument("other")
@click.argument("target", type=Path)
@click.option("--runs", default="runs", type=Path, show_default=True, help="Where artworks are.")
def main(model: str, other: str, target: Path, runs: Path) -> None:
    with errors_in_one_line():
        check_target(target, "float16")
        old, new = open_checkpoint(model), open_checkpoint(other)
        ours, theirs = old.config.autoencoder, new.config.autoencoder
        if (ours.factor, ours.latent_channels) != (theirs.factor, theirs.latent_channels):
            raise ValueError(f"{other}'s latents have another shape than {model}'s")
        if old.config.unet.in_channels != ours.latent_channels:
            raise ValueError(
                f"{model}'s UNet takes more than latents: take one that does not inpaint"
            )
        config = replace(old.config, autoencoder=theirs)
        check_target(target, "float16", config)
        models = load_parts(old, MODELS, "float32")
        others = load_parts(new, ("encoder", "decoder"), "float32")
    rows, images = emoji_data.load(config.image_size, runs / "emoji")
    images = images[[row.split == "train" for row in rows]]
    before, _ = posterior(models["encoder"], images, ours.scale)
    after, _ = posterior(others["encoder"], images, theirs.scale)
    turn(models["unet"], rotation(after, before))
    save(Models(config, **{**models, **others}), target, "float16")
    click.echo(target)


if __name__ == "__main__":
    main()
