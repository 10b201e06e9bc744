"""Saves MODEL with another autoencoder, VAE, as TARGET, a folder to train on from, in float16.

The new latents mean other things to its UNet. Its first and its last convolution are turned by the
rotation that brings latents of emoji artworks nearest to what they were (orthogonal Procrustes:
Schönemann 1966), so that it is not lost in them; training does the rest.
"""

from pathlib import Path

import click
import emoji_data
import numpy as np

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import

with errors_in_one_line(), quiet_import():
    from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
    from stable_diffusion_tf.checkpoints.load import MODELS, Models, load_parts
    from stable_diffusion_tf.checkpoints.save import check_target, save
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
@click.argument("vae", type=Path)
@click.argument("target", type=Path)
@click.option("--runs", default="runs", type=Path, show_default=True, help="Where artworks are.")
def main(model: str, vae: Path, target: Path, runs: Path) -> None:
    with errors_in_one_line():
        check_target(target, "float16")
        old, new = open_checkpoint(model), open_checkpoint(model, vae=vae)
        check_target(target, "float16", new.config)
        before, after = old.config.autoencoder, new.config.autoencoder
        if (before.factor, before.latent_channels) != (after.factor, after.latent_channels):
            raise ValueError(f"{vae}: its latents have another shape than those of {model}")
        if new.config.unet.in_channels != after.latent_channels:
            raise ValueError(f"{model} inpaints: its UNet takes more than latents")
        models = Models(new.config, **load_parts(new, MODELS, "float32"))
        encoder = load_parts(old, ("encoder",), "float32")["encoder"]
    rows, images = emoji_data.load(new.config.image_size, runs / "emoji")
    images = images[[row.split == "train" for row in rows]]
    known, _ = posterior(encoder, images, before.scale)
    latents, _ = posterior(models.encoder, images, after.scale)
    turn(models.unet, rotation(latents, known))
    save(models, target, "float16")
    click.echo(target)


if __name__ == "__main__":
    main()
