"""The command line: arguments in, PNG files out. What is slow to import waits for its use."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click

from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.samplers import SAMPLERS, STREAMS, picture_seeds

STEM = 60  # characters of a prompt in a file's name
SAMPLERS_TABLE = [
    f"{name:16} {sampler.description}{'; karras' if sampler.takes_karras else ''}"
    for name, sampler in SAMPLERS.items()
]


class Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, int]:
        """ "64" or "64x96" -> (width, height)."""
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if not match:
            self.fail(f"{value!r} is neither a side (512) nor WIDTHxHEIGHT (512x768)", param)
        return int(match[1]), int(match[2] or match[1])


# How a model is opened, where that is more than its name.
VAE = click.option(
    "--vae", metavar="PATH", help="Another autoencoder: a file, or a folder with one."
)
PREDICTION = click.option(
    "--prediction",
    type=click.Choice(["epsilon", "v"]),
    help="What a single file's network predicts, where nothing says it.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stable-diffusion-tf")
def main() -> None:
    """Stable Diffusion in Keras: pictures from text and pictures.

    \b
    Try:  sdtf generate "a red apple, noto style"
    """


@main.command(no_args_is_help=True, epilog="\n  ".join(["\b\nSamplers:", *SAMPLERS_TABLE]))
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option(
    "--prompts-file",
    metavar="FILE",
    type=click.File(encoding="utf-8-sig"),
    help="More prompts, one a line; - reads them from standard input.",
)
@click.option("--negative", metavar="TEXT", help="What the pictures should not show.")
@click.option("--literal", is_flag=True, help="Brackets and BREAK in prompts are mere text.")
@click.option(
    "--clip-skip",
    default=1,
    show_default=True,
    help="Layer of the text encoder to end with, from the last; 2 is the one before it.",
)
@click.option("--steps", default=25, show_default=True, help="Denoising steps; more is slower.")
@click.option(
    "--guidance",
    type=float,
    help="How closely to follow the prompt; 1 or less is twice as fast. [default: the model's own]",
)
@click.option(
    "--seed",
    type=click.IntRange(-1, 2**64 - 1),
    default=-1,
    help="Number of the first picture; the next ones count on. [default: -1, a random one]",
)
@click.option(
    "--rng",
    default="numpy",
    show_default=True,
    type=click.Choice(list(STREAMS)),
    help="Whose random numbers a seed stands for; torch: those of PyTorch on the CPU.",
)
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Pictures of each prompt."
)
@click.option(
    "--size",
    type=Size(),
    metavar="N|WxH",
    help="Pixels, a side or WIDTHxHEIGHT. [default: the model's own]",
)
@click.option(
    "--sampler",
    default="ddim",
    show_default=True,
    metavar="NAME",
    type=click.Choice(list(SAMPLERS)),
    help="How to step from noise to picture; see below.",
)
@click.option(
    "--karras", is_flag=True, help="Karras's noise levels, for the samplers that say so below."
)
@click.option("--eta", default=0.0, show_default=True, help="Noise that ddim adds, 0 to 1.")
@click.option(
    "--rescale",
    default=0.0,
    show_default=True,
    help="0 to 1: against the washed-out colours of strong guidance.",
)
@click.option("--image", metavar="FILE", type=click.Path(), help="A picture to draw over.")
@click.option(
    "--mask", metavar="FILE", type=click.Path(), help="Where to repaint it: white; black is kept."
)
@click.option(
    "--strength",
    default=0.5,
    show_default=True,
    help="How far to leave the picture behind: over 0, up to 1.",
)
@click.option(
    "--feather",
    default=0.0,
    show_default=True,
    help="Pixels over which what is repainted fades in, inwards from the mask's edge.",
)
@click.option(
    "--weights",
    default="emoji",
    show_default=True,
    metavar="MODEL",
    help="A preset (see `sdtf weights list`), a folder, or owner/name on a hub.",
)
@VAE
@PREDICTION
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of the networks: float32, float16, bfloat16, mixed_float16 or mixed_bfloat16.",
)
@click.option("--jit", is_flag=True, help="Compile with XLA: slower to start, then faster.")
@click.option(
    "--engine", metavar="NAME", help="What runs the networks: openvino; else the Keras backend."
)
@click.option(
    "--output",
    default="outputs",
    show_default=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
)
@click.option("--quiet", is_flag=True, help="No progress bars; only the pictures' paths.")
def generate(
    prompts: tuple[str, ...],
    prompts_file: TextIO | None,
    negative: str | None,
    literal: bool,
    clip_skip: int,
    steps: int,
    guidance: float | None,
    seed: int,
    rng: str,
    batch: int,
    size: tuple[int, int] | None,
    sampler: str,
    karras: bool,
    eta: float,
    rescale: float,
    image: str | None,
    mask: str | None,
    strength: float,
    feather: float,
    weights: str,
    vae: str | None,
    prediction: str | None,
    dtype: str,
    jit: bool,
    engine: str | None,
    output: Path,
    quiet: bool,
) -> None:
    """Draw a picture of each PROMPT, from nothing or over another picture.

    Each picture becomes a PNG in the output folder, named after its prompt; its path is printed.
    The seed and all other settings are stored in the PNG. The same seed and settings draw the same
    picture again.

    \b
    Examples:
      sdtf generate "a red apple, noto style"
      sdtf generate "cat face, blob style" "rocket, flat style" --batch 4 --seed 7
      sdtf generate "a house" --negative "tree" --steps 50 --guidance 5
      sdtf generate "a green apple" --image apple.png --strength 0.6
      sdtf generate "a worm" --image apple.png --mask hole.png --strength 1
      sdtf generate "a photo of a fox" --weights path/to/stable-diffusion --size 512x768
      sdtf generate "a (red:1.3) apple with [leaves]" --prompts-file more.txt
    """
    schedule = "karras" if karras else None
    with errors_in_one_line():
        prompts += read_prompts(prompts_file)
        if not prompts:
            raise click.UsageError("give a PROMPT, or a --prompts-file with one a line")
        check_folder(output)
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with quiet_import():
            from stable_diffusion_tf.images import free_path, png_text, save_png
            from stable_diffusion_tf.pipeline import StableDiffusion

        width, height = size or (None, None)
        sd = StableDiffusion.from_pretrained(
            weights,
            img_height=height,
            img_width=width,
            dtype=dtype,
            jit_compile=jit,
            engine=engine,
            vae=vae,
            prediction=prediction,
        )
        # All pictures are checked before the first is drawn.
        sd.tokenize(prompts, "prompt", emphasis=not literal)
        seeds = picture_seeds(seed, len(prompts) * batch)
        settings = {
            "negative_prompt": negative,
            "literal": literal,
            "clip_skip": clip_skip,
            "rng": rng,
            "steps": steps,
            "sampler": sampler,
            "schedule": schedule,
            "guidance": sd.config.guidance if guidance is None else guidance,
            "size": f"{sd.img_width}x{sd.img_height}",
            "eta": eta,
            "rescale": rescale,
            "dtype": dtype,
            "model": readable(sd.config.name),
            "weights": readable(weights),
            "vae": readable(vae),
            "prediction": prediction,
        }
        if image is not None:
            settings |= {
                "image": readable(image),
                "mask": readable(mask),
                "strength": strength,
                "feather": feather,
            }
    with errors_in_one_line(drawing=lambda: sd.last_seed is not None):
        for i, prompt in enumerate(prompts):
            its_seeds = seeds[i * batch : (i + 1) * batch]
            pictures = sd.generate(
                prompt,
                negative,
                batch,
                steps,
                guidance,
                seed=its_seeds,
                rng=rng,
                clip_skip=clip_skip,
                emphasis=not literal,
                input_image=image,
                input_mask=mask,
                input_image_strength=strength,
                mask_feather=feather,
                sampler=sampler,
                schedule=schedule,
                eta=eta,
                guidance_rescale=rescale,
                progress=not quiet,
            )
            for picture, seed in zip(pictures, its_seeds, strict=True):
                text = png_text({"prompt": prompt, "seed": seed, **settings})
                click.echo(save_png(picture, free_path(output, slug(prompt)), text))
                if not quiet:
                    click.echo(f"seed {seed}", err=True)


def readable(name: str | None) -> str | None:
    """A file's name as text that a PNG can store, whatever bytes it has."""
    return name and os.fsencode(name).decode("utf-8", "replace")


def read_prompts(file: TextIO | None) -> tuple[str, ...]:
    """The lines of a file that are not blank.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return tuple(line.strip() for line in file or () if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file.name} is not UTF-8: {error}") from None


@main.command(no_args_is_help=True)
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of the stored weights: float32, float16 or bfloat16.",
)
@VAE
@PREDICTION
def convert(source: str, target: Path, dtype: str, vae: str | None, prediction: str | None) -> None:
    """Write the model SOURCE to TARGET, for diffusers and others to open.

    TARGET is a new folder in the diffusers layout; or, if it ends in .safetensors, one new file
    with the original Stable Diffusion's names, as most other programs read. Such a file has no
    config: it is only for models whose config is a published one.

    \b
    Examples:
      sdtf convert sd-v1-4-keras my-folder
      sdtf convert my-folder my-model.safetensors --dtype float16
    """
    with errors_in_one_line():
        with quiet_import():
            from stable_diffusion_tf.checkpoints.save import convert
        convert(source, target, dtype, vae=vae, prediction=prediction)
    click.echo(target)


@main.group()
def weights() -> None:
    """Models on a hub: what is known, what is here.

    MODEL is a preset, a repository in the diffusers layout (owner/name), or a file in one
    (owner/name/path). They are stored in huggingface_hub's cache, in HF_HOME.
    """


@weights.command("list")
def list_weights() -> None:
    """Show the models that are known by name."""
    from stable_diffusion_tf.checkpoints.catalog import PRESETS, REPOSITORIES
    from stable_diffusion_tf.checkpoints.hub import cached

    with errors_in_one_line():
        for name, preset in PRESETS.items():
            here = [cached(file) for file in preset.files.values()]
            state = f"pinned, {len(here) - here.count(None)} of {len(here)} files here"
            _show(name, preset.summary, preset.license, state if here else "in the package")
        for name, (summary, license) in REPOSITORIES.items():
            _show(name, summary, license, "unpinned")


def _show(name: str, summary: str, license: str, state: str) -> None:
    click.echo(f"{name}\n    {summary}\n    {state}; {license}")


@weights.command(no_args_is_help=True)
@click.argument("model")
def download(model: str) -> None:
    """Fetch all files of MODEL, check them, and print where they are."""
    from stable_diffusion_tf.checkpoints import catalog

    with errors_in_one_line():
        for path in catalog.download(model):
            click.echo(path)


@weights.command(no_args_is_help=True)
@click.argument("model")
def where(model: str) -> None:
    """Print where the files of MODEL are; needs no network."""
    with errors_in_one_line():
        for _, path in _stored(model):
            click.echo(path)


@weights.command(no_args_is_help=True)
@click.argument("model")
def verify(model: str) -> None:
    """Hash all files of MODEL and compare; needs no network."""
    from stable_diffusion_tf.checkpoints.hub import is_whole

    damaged = []
    with errors_in_one_line():
        for file, path in _stored(model):
            whole = is_whole(file, path)
            verdict = {True: "good", False: "DAMAGED", None: "unknown: nothing says its hash"}[
                whole
            ]
            click.echo(f"{verdict}{'' if file.sha256 else ' (unpinned)'}: {path}")
            damaged += [path] if whole is False else []
        if damaged:
            raise OSError(f"{len(damaged)} damaged; delete them and download {model} again.")


def _stored(model: str) -> list[tuple[Any, Path]]:
    """Files of a model on a hub and where they are: all of them, or FileNotFoundError."""
    from stable_diffusion_tf.checkpoints.catalog import stored_files
    from stable_diffusion_tf.checkpoints.hub import cached

    places = [(file, cached(file)) for file in stored_files(model)]
    absent = [str(file) for file, path in places if path is None]
    if absent or not places:
        raise FileNotFoundError(
            f"Not downloaded: {', '.join(absent or [model])}. Run `sdtf weights download {model}`."
        )
    return places


@main.command()
def samplers() -> None:
    """List the samplers, one a line."""
    click.echo("\n".join(SAMPLERS_TABLE))


def slug(prompt: str) -> str:
    """A prompt as a file's name: its words, lower case, joined by hyphens."""
    words = re.findall(r"\w+", prompt.lower())
    return "-".join(words)[:STEM].rstrip("-") or "picture"


def check_folder(folder: Path) -> None:
    """Raises OSError where pictures could not be written; the folder may still be to be made."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; name another output folder.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} cannot be written to; name another output folder.")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keeps what TensorFlow says while it is imported off the screen, unless the import fails.

    Its first lines do not obey TF_CPP_MIN_LOG_LEVEL and are written by C++, past `sys.stderr`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    screen = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(screen, said.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


@contextmanager
def errors_in_one_line(drawing: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Reports what is wrong with the input, and Ctrl-C, without a traceback.

    Once `drawing()`, the arguments have been found right. Then only the model's files, the disk or
    an overflow can be at fault; any other error is one of the program, and shown in full.
    """
    try:
        yield
    except (
        ValueError,
        OSError,
        ImportError,
        NotImplementedError,
        FloatingPointError,
    ) as error:
        if drawing() and not isinstance(error, CheckpointError | OSError | FloatingPointError):
            raise
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
