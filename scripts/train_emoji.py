"""Trains the embedded default model from emoji artwork and saves it as a folder to load.

First the autoencoder, then text-conditional diffusion in its latents, the text encoder trained
along, then the decoder once more, on what denoising gives it and against an adversary. Kill it at
any moment and run it again: it goes on from its last save. Losses, saves and a picture sheet every
so often are in the runs folder.
"""

from dataclasses import replace
from pathlib import Path

import click
import emoji_data
import numpy as np
from evaluate_emoji import psnr
from tqdm import tqdm

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import
from stable_diffusion_tf.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion_tf.images import signed_to_unit, unit_to_uint8

with errors_in_one_line(), quiet_import():
    import keras

    from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
    from stable_diffusion_tf.checkpoints.load import Models, load_parts
    from stable_diffusion_tf.checkpoints.save import check_target, save
    from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet
    from stable_diffusion_tf.pipeline import StableDiffusion
    from stable_diffusion_tf.training.adversary import Discriminator, adversary
    from stable_diffusion_tf.training.data import (
        NOISE,
        noisy_batches,
        posterior,
        random,
        shuffled,
        signed,
        tokenizer,
    )
    from stable_diffusion_tf.training.loop import (
        check_apart,
        checksum,
        save_preview,
        train,
        weights,
    )
    from stable_diffusion_tf.training.loss import (
        NORMS,
        autoencoder_loss,
        denoised_loss,
        diffusion_loss,
    )
    from stable_diffusion_tf.training.optimizer import adamw, muon

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
    autoencoder=AutoencoderConfig(widths=(24, 56, 112), resnets=1, groups=8, scale=1.0),
    # From pure noise, so that white backgrounds are white (arXiv:2305.08891), down to next to none,
    # so that a picture drawn over with little strength changes little.
    schedule=ScheduleConfig(
        prediction="v", spacing="linspace", final_alpha_one=True, zero_terminal_snr=True
    ),
    image_size=64,
    guidance=3.0,
)
AUTOENCODER_BATCH, DECODER_BATCH = 32, 16
WARMUP = 200  # of any number of steps: each run can be made longer


@click.command(help=__doc__)
@click.argument("target", type=Path)
@click.option("--autoencoder-steps", default=1400, show_default=True, type=click.IntRange(1))
@click.option(
    "--steps",
    default=5000,
    show_default=True,
    type=click.IntRange(0),
    help="Of diffusion; 0 leaves text encoder and UNet as --start has them, or without it random.",
)
@click.option(
    "--decoder-steps",
    default=800,
    show_default=True,
    type=click.IntRange(0),
    help="Of the decoder on denoised latents; 0 leaves it as it is.",
)
@click.option(
    "--adversary-weight",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0),
    help="Of deceiving the adversary, beside the distance to the artwork, in the decoder's steps; "
    "0: there is none.",
)
@click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Artworks a step of diffusion.",
)
@click.option(
    "--dtype",
    default="mixed_bfloat16",
    show_default=True,
    type=click.Choice(["float32", "mixed_bfloat16", "mixed_float16"]),
    help="Of diffusion. On a processor without AVX-512 BF16 or AMX, float32 is the faster.",
)
@click.option(
    "--rate",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Learning rate of diffusion; a lower one unsettles less of a model that is gone on from.",
)
@click.option("--norm", default="l2", show_default=True, type=click.Choice(list(NORMS)))
@click.option(
    "--shift",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of the timesteps drawn, towards noise, where the text decides; 1 draws all alike.",
)
@click.option(
    "--min-snr",
    type=click.FloatRange(0, min_open=True),
    metavar="GAMMA",
    help="Weigh timesteps by their signal-to-noise ratio, up to GAMMA (arXiv:2303.09556: 5).",
)
@click.option(
    "--scales",
    default=1,
    show_default=True,
    type=click.IntRange(1, 5),
    help="Weigh errors of 2x2, 4x4, ... means of the latents too, at so many scales in all: they "
    "are the colours of areas (arXiv:2301.11093).",
)
@click.option(
    "--flip/--no-flip", default=False, help="Mirrored artworks too, with captions that say so."
)
@click.option("--jit/--no-jit", default=False, help="Compile through XLA.")
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A saved model to go on from: its encoder is kept, the rest trained further.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Of all draws; a new one when going on from a saved model.",
)
@click.option(
    "--save-every",
    default=400,
    show_default=True,
    type=click.IntRange(1),
    help="Steps between saves, each with a picture sheet.",
)
@click.option("--runs", default="runs", type=Path, show_default=True, help="Where saves go.")
def main(
    target,
    autoencoder_steps,
    steps,
    decoder_steps,
    adversary_weight,
    batch_size,
    dtype,
    rate,
    norm,
    shift,
    min_snr,
    scales,
    flip,
    jit,
    start,
    seed,
    save_every,
    runs,
):
    with errors_in_one_line():
        source = None if start is None else open_checkpoint(start)
        check_target(target, "float16", EMOJI if source is None else source.config)
        for made in ("emoji", "autoencoder", "diffusion", "decoder"):
            check_apart(target, runs / made)
        if not steps and decoder_steps and source is None:
            raise ValueError(
                "the decoder learns from what a trained network gives it: --steps 0 wants --start, "
                "or --decoder-steps 0"
            )
    rows, images = emoji_data.load(EMOJI.image_size, runs / "emoji")
    known = np.array([row.split == "train" for row in rows])
    captions, shown = [row for row in rows if row.split == "train"], images[known]
    if flip:
        turned, pictures = emoji_data.mirrored(captions, shown)
        captions, shown = captions + turned, np.concatenate([shown, pictures])
    least = max(  # of the stages that there are
        AUTOENCODER_BATCH if source is None else 1,
        batch_size if steps else 1,
        DECODER_BATCH if decoder_steps else 1,
    )
    if len(shown) < least or known.all():
        raise click.ClickException(
            f"{len(shown)} artworks to learn and {(~known).sum()} held out are too few: a batch "
            f"takes {least}, a preview 1. Add more, or take a smaller --batch-size"
        )

    if source is None:
        models = new_models(
            shown, images[~known], autoencoder_steps, dtype, seed, runs, jit, save_every
        )
    else:
        trained = load_parts(source, ("text_encoder", "unet"), dtype)
        models = Models(source.config, **trained, **load_parts(source, ("encoder", "decoder")))
    if steps or decoder_steps:
        latents = posterior(models.encoder, shown, models.config.autoencoder.scale)
    if steps:
        train_diffusion(
            models,
            latents,
            captions,
            dtype=dtype,
            rate=rate,
            norm=norm,
            shift=shift,
            min_snr=min_snr,
            scales=scales,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            save_every=save_every,
            folder=runs / "diffusion",
            jit=jit,
        )
    if decoder_steps:
        train_decoder(
            models,
            latents,
            shown,
            captions,
            images[~known],
            adversary_weight=adversary_weight,
            steps=decoder_steps,
            seed=seed,
            save_every=save_every,
            folder=runs / "decoder",
            jit=jit,
        )
    save(models, target, dtype="float16")


def new_models(known, unknown, autoencoder_steps, dtype, seed, runs, jit, save_every):
    """A trained autoencoder, and text encoder and UNet with random weights."""
    encoder, decoder = train_autoencoder(
        known, unknown, autoencoder_steps, seed, runs / "autoencoder", jit, save_every
    )
    mean, _ = posterior(encoder, known)
    scale = float(1 / mean.std())  # latents of unit variance, as the schedule assumes
    config = replace(EMOJI, autoencoder=replace(EMOJI.autoencoder, scale=scale))
    scaled_decoder = Decoder(config.autoencoder)
    scaled_decoder.set_weights(decoder.get_weights())
    keras.utils.set_random_seed(seed)  # again: a run that goes on may have drawn less before
    return Models(
        config,
        TextEncoder(config.text_encoder, dtype),
        UNet(config.unet, dtype),
        encoder,
        scaled_decoder,
    )


def train_autoencoder(
    known, unknown, steps, seed, folder, jit, save_every, batch_size=AUTOENCODER_BATCH
):
    """Trains on `known` pictures, reports on `unknown` ones: -> encoder, decoder."""
    keras.utils.set_random_seed(seed)  # the initial weights; the rest is seeded step by step
    encoder, decoder = Encoder(EMOJI.autoencoder), Decoder(EMOJI.autoencoder)
    side = EMOJI.image_size // EMOJI.autoencoder.factor
    shape = (batch_size, side, side, EMOJI.autoencoder.latent_channels)

    def batch(step):
        picked = known[shuffled(len(known), batch_size, seed, step)]
        return signed(picked), random(seed, NOISE, step).standard_normal(shape, np.float32)

    train(
        autoencoder_loss(encoder, decoder),
        batch,
        [encoder, decoder],
        adamw(2e-3, steps, ema_momentum=0.995, warmup=WARMUP),
        steps=steps,
        folder=folder,
        recipe={
            "batch_size": batch_size,
            "seed": seed,
            "pictures": checksum([np.ascontiguousarray(known)]),
        },
        save_every=save_every,
        preview=rebuilding(encoder, decoder, unknown, folder),
        jit=jit,
    )
    return encoder, decoder


def rebuilding(encoder, decoder, unknown, folder):
    """Returns a preview of 24 `unknown` pictures beside what the autoencoder makes of them."""
    shown = spread(unknown, 24)

    def preview(step):
        mean, _ = posterior(encoder, shown, decoder.config.scale)
        again = unit_to_uint8(signed_to_unit(decoder.predict_on_batch(mean)))
        tqdm.write(f"step {step}: PSNR {psnr(shown, again):.2f} dB on unseen artworks")
        pairs = np.stack([shown, again], axis=1).reshape(-1, *shown.shape[1:])
        save_preview(pairs, folder, step, columns=12)

    return preview


def train_diffusion(
    models,
    latents,
    captions,
    *,
    dtype,
    rate,
    norm,
    shift,
    min_snr,
    scales,
    steps,
    seed,
    batch_size,
    save_every,
    folder,
    jit,
):
    """Trains text encoder and UNet on the Gaussians `latents` of captioned pictures."""
    prediction = models.config.schedule.prediction
    sd = StableDiffusion.from_models(models)
    texts = [emoji_data.caption(row) for row in captions if not row.mirrored]
    prompts = spread(texts, 32)

    def preview(step):
        pictures = sd.generate(prompts, num_steps=15, seed=0, emphasis=False, progress=False)
        save_preview(pictures, folder, step, columns=8)

    train(
        diffusion_loss(models.text_encoder, models.unet, prediction, norm, min_snr, scales),
        emoji_batches(models, latents, captions, batch_size, seed, shift),
        [models.text_encoder, models.unet],
        # Longer averages lag behind a run of few passes; the falling rate averages enough.
        muon(rate, steps, ema_momentum=0.99, loss_scaling=dtype == "mixed_float16", warmup=WARMUP),
        steps=steps,
        folder=folder,
        recipe={
            "dtype": dtype,
            "rate": rate,
            "norm": norm,
            "batch_size": batch_size,
            "shift": shift,
            "min_snr": min_snr,
            "scales": scales,
            "seed": seed,
            "latents": checksum([np.ascontiguousarray(latents[0])]),
            "captions": checksum(repr(row).encode() for row in captions),
            "config": models.config.nameless(),
            "start": checksum(weights(models.text_encoder, models.unet)),
        },
        save_every=save_every,
        preview=preview,
        jit=jit,
    )


def train_decoder(
    models,
    latents,
    images,
    captions,
    unknown,
    *,
    adversary_weight,
    steps,
    seed,
    save_every,
    folder,
    jit,
    batch_size=DECODER_BATCH,
):
    """Trains the decoder alone, on x0 that the trained network sees in a little noise.

    Its pictures shall come near `images` and, unless `adversary_weight` is 0, deceive an adversary;
    it reports on `unknown` ones.
    """
    noisy = emoji_batches(models, latents, captions, batch_size, seed, shift=0.05)
    trained, opponent = [models.decoder], None
    if adversary_weight:
        keras.utils.set_random_seed(seed)  # of the discriminator's initial weights
        discriminator = Discriminator()
        trained.append(discriminator)
        opponent = adversary(discriminator, adversary_weight)

    def batch(step):  # and the artworks, in the order that `noisy_batches` takes them
        return *noisy(step), signed(images[shuffled(len(images), batch_size, seed, step)])

    train(
        denoised_loss(
            models.text_encoder,
            models.unet,
            models.decoder,
            models.config.schedule.prediction,
            adversary=opponent,
        ),
        batch,
        trained,
        adamw(5e-4, steps, ema_momentum=0.99, warmup=WARMUP),
        steps=steps,
        folder=folder,
        recipe={
            "batch_size": batch_size,
            "seed": seed,
            "adversary_weight": adversary_weight,
            "pictures": checksum([np.ascontiguousarray(images)]),
            "captions": checksum(repr(row).encode() for row in captions),
            "config": models.config.nameless(),
            "start": checksum(weights(models.text_encoder, models.unet, models.decoder)),
        },
        save_every=save_every,
        preview=rebuilding(models.encoder, models.decoder, unknown, folder),
        jit=jit,
    )


def emoji_batches(models, latents, captions, batch_size, seed, shift):
    """`noisy_batches` of the artworks that have the Gaussians `latents`."""
    return noisy_batches(
        *latents,
        lambda i, rng: emoji_data.captions(captions[i], rng),
        tokenizer(models.config.text_encoder),
        models.config.schedule,
        batch_size=batch_size,
        seed=seed,
        shift=shift,
    )


def spread(items, count):
    """`count` of the items from all over them, or all where there are fewer."""
    return items[:: max(1, len(items) // count)][:count]


if __name__ == "__main__":
    main()
