"""Fine-tunes SOURCE on a folder of captioned PICTURES and saves it as TARGET, a folder to load.

SOURCE is a preset, a folder, a file or a repository on a hub, whatever `sdtf generate --weights`
takes; --vae and --prediction are as there. PICTURES has a caption beside each picture: of fox.jpg,
in fox.txt. The middle square of each is scaled to the model's size. TARGET is new, in the diffusers
layout, in float32.

The UNet is trained, all of it or, with --lora-rank, small additions to its attentions; the text
encoder and the autoencoder stay as they are. Kill it at any moment and run it again: it goes on
from its last save, of which there is one every --save-every steps. Losses, saves and sheets of what
is drawn of the first captions are in the runs folder, under TARGET's name.

\b
  python scripts/finetune.py emoji my-pictures my-emoji --steps 100 --rate 1e-3
  sdtf generate "what a caption says" --weights my-emoji
"""

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from stable_diffusion_tf.cli.options import PREDICTION, VAE
from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import
from stable_diffusion_tf.files import check_folder

with errors_in_one_line(), quiet_import():
    import keras

    from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
    from stable_diffusion_tf.checkpoints.load import Models, load_parts
    from stable_diffusion_tf.checkpoints.save import check_target, save
    from stable_diffusion_tf.pipeline import StableDiffusion
    from stable_diffusion_tf.training.data import (
        captions,
        noisy_batches,
        posterior,
        square,
        tokenizer,
    )
    from stable_diffusion_tf.training.loop import (
        check_apart,
        checksum,
        save_preview,
        train,
        weights,
    )
    from stable_diffusion_tf.training.lora import enable_lora
    from stable_diffusion_tf.training.loss import diffusion_loss
    from stable_diffusion_tf.training.optimizer import adamw

SHOWN = 4  # captions that are drawn at each save


@click.command(help=__doc__)
@click.argument("source")
@click.argument("pictures", type=Path)
@click.argument("target", type=Path)
@click.option(
    "--steps",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="In all; the rate rises over a tenth of them, 200 at most, and falls in the last quarter.",
)
@click.option(
    "--batch-size",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Pictures a step; fewer take less memory.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of learning, at most. [default: 1e-5; with LoRA 1e-4]",
)
@click.option(
    "--dtype",
    default="mixed_bfloat16",
    show_default=True,
    type=click.Choice(["float32", "mixed_bfloat16", "mixed_float16"]),
    help="On a processor without AVX-512 BF16 or AMX, float32 is the faster.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(1),
    metavar="RANK",
    help="Train additions of this rank only, such as 4 (arXiv:2106.09685): less memory.",
)
@click.option(
    "--save-every",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Steps between saves, at each of which captions are drawn.",
)
@VAE
@PREDICTION
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Of all draws.",
)
@click.option("--runs", default="runs", type=Path, show_default=True, help="Where saves go.")
def main(
    source,
    pictures,
    target,
    steps,
    batch_size,
    rate,
    dtype,
    lora_rank,
    save_every,
    vae,
    prediction,
    seed,
    runs,
):
    with errors_in_one_line():
        check_target(target, "float32")
        check_apart(target, runs / target.name)
        check_folder(runs / target.name, "name another folder with --runs")
        checkpoint = open_checkpoint(source, vae=vae, prediction=prediction)
        check_target(target, "float32", checkpoint.config)
        if checkpoint.config.unet.inpaints:
            raise ValueError(f"{source}: its UNet is for inpainting, which is not trained here")
        images, texts = read(pictures, checkpoint.config, batch_size)
        networks = load_parts(checkpoint, ("text_encoder", "unet"), dtype)
        autoencoder = load_parts(checkpoint, ("encoder", "decoder"), "float32")
        config = replace(checkpoint.config, name=target.resolve().name)
        models = Models(config, **networks, **autoencoder)
        recipe = {
            "source": checksum(weights(*networks.values(), *autoencoder.values())),
            "config": checkpoint.config.nameless(),
            "pictures": checksum([images]),
            "captions": checksum([repr(texts).encode()]),
            "dtype": dtype,
            "batch_size": batch_size,
            "rate": rate or (1e-4 if lora_rank else 1e-5),
            "lora_rank": lora_rank,
            "seed": seed,
        }
        finetune(models, images, texts, recipe, steps, save_every, runs / target.name)
        save(models, target)
        click.echo(target)


def read(folder, config, batch_size):
    """The pictures as the model takes them, uint8 (N, S, S, 3), and their captions, all checked."""
    captioned = captions(folder)
    if len(captioned) < batch_size:
        raise ValueError(
            f"{folder} has too few pictures, {len(captioned)}, for a batch of {batch_size}: give "
            "more, or a smaller --batch-size"
        )
    for path, text in captioned.items():
        tokenizer(config.text_encoder)([text], name=str(path.with_suffix(".txt")))
    paths = tqdm(captioned, "Reading the pictures", unit="picture")
    return np.stack([square(path, config.image_size) for path in paths]), list(captioned.values())


def finetune(models, images, texts, recipe, steps, save_every, folder):
    """Trains the UNet, or additions to it, on captioned pictures."""
    scale = models.config.autoencoder.scale
    shown = tqdm(images, "Encoding the pictures", unit="picture")
    moments = [posterior(models.encoder, image[None], scale) for image in shown]
    mean, deviation = map(np.concatenate, zip(*moments, strict=True))
    models.text_encoder.trainable = False
    keras.utils.set_random_seed(recipe["seed"])  # of LoRA's initial weights
    if recipe["lora_rank"]:
        enable_lora(models.unet, recipe["lora_rank"])
    sd = StableDiffusion.from_models(models)
    prompts = list(dict.fromkeys(texts))[:SHOWN]

    def preview(step):
        drawn = sd.generate(prompts, seed=0, emphasis=False, progress=False)
        save_preview(drawn, folder, step, labels=prompts)

    train(
        diffusion_loss(models.text_encoder, models.unet, models.config.schedule.prediction),
        noisy_batches(
            mean,
            deviation,
            lambda i, rng: texts[i],
            tokenizer(models.config.text_encoder),
            models.config.schedule,
            batch_size=recipe["batch_size"],
            seed=recipe["seed"],
        ),
        [models.text_encoder, models.unet],
        # A short average: a longer one would hold what SOURCE was before a short training.
        adamw(
            recipe["rate"],
            steps,
            ema_momentum=0.99,
            loss_scaling=recipe["dtype"] == "mixed_float16",
        ),
        steps=steps,
        folder=folder,
        recipe=recipe,
        save_every=save_every,
        preview=preview,
    )


if __name__ == "__main__":
    main()
