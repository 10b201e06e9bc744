"""`sdtf generate`: draws pictures and stores how each was drawn in its PNG."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
import numpy as np

from stable_diffusion_tf.checkpoints.hub import sha256
from stable_diffusion_tf.cli.options import (
    PREDICTION,
    VAE,
    Karras,
    SamplerName,
    Size,
    option,
    setting,
)
from stable_diffusion_tf.cli.repeat import (
    Like,
    changed,
    check_batch,
    check_config,
    check_inputs,
    check_models,
    check_network,
    take_settings,
    taken,
    unusual,
    without_a_mask,
)
from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import, warnings_once
from stable_diffusion_tf.files import check_folder
from stable_diffusion_tf.images import SUFFIXES, contact_sheet, free_path, save_png
from stable_diffusion_tf.samplers import SAMPLERS, STREAMS, picture_seeds
from stable_diffusion_tf.settings import png_text

if TYPE_CHECKING:
    from stable_diffusion_tf.pipeline import StableDiffusion

# Settings by which a model is opened; the others are those of `StableDiffusion.generate`.
MODEL = ("weights", "vae", "prediction", "dtype", "jit_compile", "engine")
STEM = 60  # characters of a prompt in a file's name
STEM_BYTES = 180  # of 255 that a name may have; the rest is for numbers, and a temporary name's
DEVICES = "con|prn|aux|nul|(com|lpt)[0-9¹²³]"  # to Windows, whatever the suffix
SAMPLERS_TABLE = [
    f"{name:16} {sampler.description}{'; karras' if sampler.takes_karras else ''}"
    for name, sampler in SAMPLERS.items()
]


def like_png(context: click.Context, _: click.Parameter, path: str | None) -> Like | None:
    if path is None or context.resilient_parsing:
        return None
    with errors_in_one_line():
        return take_settings(context, path)


@click.command(no_args_is_help=True, epilog="\n  ".join(["\b\nSamplers:", *SAMPLERS_TABLE]))
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@option(
    "--prompts-file",
    metavar="FILE",
    type=click.File(encoding="utf-8-sig"),
    help="More prompts, one a line; - reads them from standard input.",
)
@option(
    "--like",
    metavar="PNG",
    type=click.Path(),
    is_eager=True,
    callback=like_png,
    help="Draw this picture again: its prompt and settings, where none are given here.",
)
@setting("--negative", "negative_prompt", metavar="TEXT", help="What pictures should not show.")
@setting(
    "--emphasis/--literal",
    default=True,
    help="Whether brackets and BREAK in prompts have a meaning, or are mere text.",
)
@setting(
    "--clip-skip",
    default=1,
    show_default=True,
    help="Layer of the text encoder to end with, from the last; 2 is the one before it.",
)
@setting(
    "--steps", "num_steps", default=25, show_default=True, help="Denoising steps; more is slower."
)
@setting(
    "--reuse",
    default=1,
    show_default=True,
    metavar="N",
    help="Run the whole network every N steps, only its shallow part between; 2 or 3 is faster, "
    "less exact.",
)
@setting(
    "--guidance",
    "unconditional_guidance_scale",
    type=float,
    help="How closely to follow the prompt; 1 or less is twice as fast. [default: the model's own]",
)
@setting(
    "--seed",
    type=click.IntRange(-1, 2**64 - 1),
    default=-1,
    help="Number of the first picture; the next ones count on. [default: -1, a random one]",
)
@setting(
    "--rng",
    default="numpy",
    show_default=True,
    type=click.Choice(list(STREAMS)),
    help="Whose random numbers a seed stands for; torch: those of PyTorch on the CPU.",
)
@option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Pictures of each prompt."
)
@setting(
    "--size",
    type=Size(),
    metavar="N|WxH",
    help="Pixels, a side or WIDTHxHEIGHT. [default: the model's own]",
)
@setting(
    "--sampler",
    default="ddim",
    show_default=True,
    metavar="NAME",
    type=SamplerName(),
    help="How to step from noise to picture; see below.",
)
@setting(
    "--karras/--no-karras",
    "schedule",
    type=Karras(),
    default=None,
    help="Karras's noise levels, for the samplers that say so below.",
)
@setting("--eta", default=0.0, show_default=True, help="Noise that ddim adds, 0 to 1.")
@setting(
    "--rescale",
    "guidance_rescale",
    default=0.0,
    show_default=True,
    help="0 to 1: against the washed-out colours of strong guidance.",
)
@setting(
    "--image",
    "input_image",
    metavar="FILE",
    type=click.Path(),
    help="A picture to draw over; one of another shape is stretched, crop it first.",
)
@setting(
    "--mask",
    "input_mask",
    metavar="FILE",
    type=click.Path(),
    help="Where to repaint it: white; black is kept.",
)
@setting(
    "--strength",
    "input_image_strength",
    default=0.5,
    show_default=True,
    help="How far to leave the picture behind: over 0, up to 1.",
)
@setting(
    "--feather",
    "mask_feather",
    default=0.0,
    show_default=True,
    help="Width, in pixels of the picture that is drawn, over which what is repainted fades in, "
    "inwards from the mask's edge.",
)
@setting(
    "--weights",
    default="emoji",
    show_default=True,
    metavar="MODEL",
    help="A preset (see `sdtf weights list`), a folder, or owner/name on a hub.",
)
@VAE
@PREDICTION
@setting(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of the networks: float32, bfloat16 or mixed_bfloat16; or, for a GPU, float16 or "
    "mixed_float16, in which a processor can be hundreds of times slower.",
)
@setting(
    "--jit/--no-jit",
    "jit_compile",
    default=False,
    help="Compile with XLA: slower to start, then faster.",
)
@setting(
    "--engine", metavar="NAME", help="What runs the networks: openvino; else the Keras backend."
)
@option(
    "--output",
    default="outputs",
    show_default=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
)
@click.option(
    "--grid", is_flag=True, help="One more picture, grid.png, with all of them and their prompts."
)
@click.option("--quiet", is_flag=True, help="No progress bars; only the pictures' paths.")
@click.pass_context
def generate(
    context: click.Context,
    prompts: tuple[str, ...],
    prompts_file: TextIO | None,
    like: Like | None,
    batch: int,
    output: Path,
    grid: bool,
    quiet: bool,
    *,
    seed: int,
    size: tuple[int, int] | None,
    **drawing: Any,
) -> None:
    """Draw a picture of each PROMPT, from nothing or over another picture.

    Each picture becomes a PNG in the output folder, named after its prompt, with a number where
    that name is taken; its path is printed. The seed and all other settings are stored in the PNG;
    `sdtf info` prints them, and --like draws the picture again, bit for bit with the same machine
    and versions. What is given beside it, a prompt or settings, counts; the rest is the PNG's. An
    empty value, as in --image "", is the option's default.

    \b
    Examples:
      sdtf generate "a red apple, noto style"
      sdtf generate "cat face, blob style" "rocket, flat style" --batch 4 --seed 7 --grid
      sdtf generate "apple, noto style" --negative "green apple, noto style" --steps 50
      sdtf generate "a green apple, noto style" --image apple.png --strength 0.6
      sdtf generate "a worm, noto style" --image apple.png --mask hole.png --strength 1
      sdtf generate "a photo of a fox" --weights path/to/stable-diffusion --size 512x768
      sdtf generate "a (red:1.3) apple, [flat] style" --prompts-file more.txt
      sdtf generate --like outputs/rocket-flat-style.png --steps 100
    """
    model = {name: drawing.pop(name) for name in MODEL}
    with errors_in_one_line():
        words = [prompt for prompt in prompts if prompt.isascii() and " " not in prompt]
        unquoted = len(words) == len(prompts) > 1
        prompts += read_prompts(prompts_file)
        repeated = like is not None and not prompts and not changed(context)
        if like is not None:
            drawing |= without_a_mask(context)
            prompts = prompts or (like.prompt,)
            check_inputs(context, like)
        if not prompts:
            raise click.UsageError(
                "give a PROMPT, a --prompts-file with one a line, or a picture to draw --like"
            )
        if unusual(context, "input_image_strength") and drawing["input_image"] is None:
            raise ValueError("--strength is how far to leave --image behind; give that too")
        for name in ("input_image", "input_mask"):
            path = drawing[name] and Path(drawing[name])
            if path and path.exists() and not path.is_file():
                raise ValueError(f"{name}: {path} is no file; save the picture as one")
        if output.suffix.lower() in SUFFIXES and not output.is_dir():
            raise ValueError(
                f"--output {output} is a picture's name; give a folder, for pictures are named "
                "after their prompts"
            )
        check_folder(output, "name another output folder")
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            # In the place of the handler that logging falls back on, which prints warnings.
            logging.getLogger("stable_diffusion_tf").addHandler(logging.NullHandler())
        sd, facts = open_model(context, like, size, **model)
        # All pictures are checked before the first is drawn.
        sd.tokenize(prompts, "prompt", emphasis=drawing["emphasis"])
        wanted = picture_seeds(seed, len(prompts) * batch)
        batches = [wanted[i : i + batch] for i in range(0, len(wanted), batch)]
        if repeated:  # and all that were drawn beside it: a picture's last bits depend on them
            check_batch(like, sd.img_width, sd.img_height)
            if not quiet and like.facts.get("backend", facts["backend"]) != facts["backend"]:
                click.echo(
                    f"{like.path} was drawn on another Keras backend: last bits may differ.",
                    err=True,
                )
            wanted, batches = [like.seed], [like.facts["batch_seeds"]]
        if drawing["unconditional_guidance_scale"] is None:
            drawing["unconditional_guidance_scale"] = sd.config.guidance
        settings = {**drawing, "size": f"{sd.img_width}x{sd.img_height}", **model}
        for name in ("input_image", "input_mask"):
            if drawing[name] is not None:
                facts[f"{name}_sha256"] = sha256(Path(drawing[name]))
    if unquoted and not quiet:
        click.echo(f"{len(prompts)} prompts; one of several words goes in quotes.", err=True)
    drawn, labels = [], []
    with errors_in_one_line(drawing=lambda: sd.last_seed is not None), warnings_once():
        for prompt, seeds in zip(prompts, batches, strict=True):
            pictures = sd.generate(
                prompt, batch_size=len(seeds), seed=seeds, progress=not quiet, **drawing
            )
            facts["batch_seeds"] = seeds
            for picture, its_seed in zip(pictures, seeds, strict=True):
                if its_seed not in wanted:
                    continue
                made = {"prompt": prompt, "seed": its_seed, **settings}
                its_name = SAMPLERS[drawing["sampler"]].a1111
                text = png_text(readable(made), readable(facts), its_name)
                click.echo(save_png(picture, free_path(output, slug(prompt)), text))
                if grid:
                    drawn.append(picture)
                    labels.append(f"{its_seed}: {prompt}")
                if not quiet:
                    click.echo(f"seed {its_seed}", err=True)
        if grid:
            a_row_each = batch if batch > 1 and len(prompts) > 1 else None
            sheet = contact_sheet(np.stack(drawn), a_row_each, labels)
            click.echo(save_png(sheet, free_path(output, "grid")))


def open_model(
    context: click.Context,
    like: Like | None,
    size: tuple[int, int] | None,
    *,
    weights: str,
    vae: str | None,
    prediction: str | None,
    dtype: str,
    jit_compile: bool,
    engine: str | None,
) -> tuple["StableDiffusion", dict[str, Any]]:
    """Returns the model and facts of it, to which its networks' hashes come as they are loaded.

    Raises:
        ChangedError: the model of `like` is not there, or has another config than it had; while it
            draws: a network is another than it was.
    """
    with quiet_import():
        import keras

        from stable_diffusion_tf.checkpoints.catalog import PRESETS, is_on_hub, open_checkpoint
        from stable_diffusion_tf.checkpoints.fit import watched
        from stable_diffusion_tf.pipeline import StableDiffusion

    if taken(context, "weights") and is_on_hub(weights):
        click.echo(f"{like.path} asks for {weights}, a model on a hub.", err=True)
    if like is not None:
        check_models(context, like, lambda path: path in PRESETS or is_on_hub(path))
    checkpoint = open_checkpoint(weights, vae=vae, prediction=prediction)
    facts = {
        "version": installed_version(),
        "backend": keras.backend.backend(),
        "model": checkpoint.config.name,
        "config_sha256": hashlib.sha256(checkpoint.config.nameless().encode()).hexdigest(),
    }
    if like is not None:
        check_config(context, like, facts)
    hashed = cache(sha256)  # for networks that share a file, of gigabytes

    def note(part: str, files: list[Path]) -> None:
        facts[f"{part}_sha256"] = its_hash = hashed(*files)
        if like is not None:
            check_network(context, like, part, its_hash)

    width, height = size or (None, None)
    sd = StableDiffusion.from_pretrained(
        watched(checkpoint, note),
        img_height=height,
        img_width=width,
        dtype=dtype,
        jit_compile=jit_compile,
        engine=engine,
    )
    return sd, facts


def readable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with all text as a PNG can store it: files' names may be of any bytes."""
    return {
        name: os.fsencode(value).decode("utf-8", "replace") if isinstance(value, str) else value
        for name, value in values.items()
    }


def installed_version() -> str:
    try:
        return version("stable-diffusion-tf")
    except PackageNotFoundError:  # run from its source
        return "unknown"


def read_prompts(file: TextIO | None) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return tuple(line.strip() for line in file or () if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file.name} is not UTF-8: {error}") from None


def slug(prompt: str) -> str:
    """A prompt as a file's name on any system: its words, lower case, joined by hyphens."""
    stem = "-".join(re.findall(r"\w+", prompt.lower()))[:STEM]
    stem = stem.encode()[:STEM_BYTES].decode(errors="ignore").strip("-")
    if not stem or re.fullmatch(DEVICES, stem):
        return f"picture-{stem}".rstrip("-")
    return stem
