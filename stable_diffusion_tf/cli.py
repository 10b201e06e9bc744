"""The command line: arguments in, PNG files out. What is slow to import waits for its use."""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
import numpy as np

from stable_diffusion_tf.checkpoints.hub import sha256
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.files import check_folder
from stable_diffusion_tf.images import SUFFIXES, contact_sheet, free_path, read_png_text, save_png
from stable_diffusion_tf.repeat import (
    ChangedError,
    Like,
    changed,
    check_batch,
    check_config,
    check_inputs,
    check_models,
    check_network,
    given,
    setting,
    take_settings,
    taken,
)
from stable_diffusion_tf.samplers import SAMPLERS, STREAMS, picture_seeds
from stable_diffusion_tf.screen import printable
from stable_diffusion_tf.settings import KEYWORD, png_text

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


class Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, int]:
        """ "64" or "64x96" -> (width, height)."""
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", str(value))
        if not match:
            self.fail(f"{value!r} is neither a side (512) nor WIDTHxHEIGHT (512x768)", param)
        return int(match[1]), int(match[2] or match[1])


class Karras(click.types.BoolParamType):
    """On or off -> what `generate` calls `schedule`: "karras" or None."""

    name = "karras"

    def convert(self, value: Any, param: Any, context: Any) -> str | None:
        return "karras" if value == "karras" or super().convert(value, param, context) else None


def like_png(context: click.Context, _: click.Parameter, path: str | None) -> Like | None:
    if path is None or context.resilient_parsing:
        return None
    with errors_in_one_line():
        return take_settings(context, path)


# How a model is opened, where that is more than its name.
VAE = setting("--vae", metavar="PATH", help="Another autoencoder: a file, or a folder with one.")
PREDICTION = setting(
    "--prediction",
    type=click.Choice(["epsilon", "v"]),
    help="What the model's network predicts, whatever its own files say.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stable-diffusion-tf")
def main() -> None:
    """Stable Diffusion in Keras: pictures from text and pictures.

    \b
    Try:  sdtf generate "a red apple, noto style"
    """
    if sys.stderr is None:  # closed: else the next file that is opened gets what is said there
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        os.dup2(sys.stderr.fileno(), 2)
    if getattr(sys.stdout, "errors", None) == "strict":  # a prompt may have what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command(no_args_is_help=True, epilog="\n  ".join(["\b\nSamplers:", *SAMPLERS_TABLE]))
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option(
    "--prompts-file",
    metavar="FILE",
    type=click.File(encoding="utf-8-sig"),
    help="More prompts, one a line; - reads them from standard input.",
)
@click.option(
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
@click.option(
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
    type=click.Choice(list(SAMPLERS)),
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
    help="Pixels over which what is repainted fades in, inwards from the mask's edge.",
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
@click.option(
    "--output",
    default="outputs",
    show_default=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
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

    Each picture becomes a PNG in the output folder, named after its prompt; its path is printed.
    The seed and all other settings are stored in the PNG; `sdtf info` prints them, and --like draws
    the picture again, bit for bit with the same machine and versions. What is given beside it, a
    prompt or settings, counts; the rest is the PNG's. An empty value, as in --image "", is the
    option's default.

    \b
    Examples:
      sdtf generate "a red apple, noto style"
      sdtf generate "cat face, blob style" "rocket, flat style" --batch 4 --seed 7 --grid
      sdtf generate "a house" --negative "tree" --steps 50 --guidance 5
      sdtf generate "a green apple" --image apple.png --strength 0.6
      sdtf generate "a worm" --image apple.png --mask hole.png --strength 1
      sdtf generate "a photo of a fox" --weights path/to/stable-diffusion --size 512x768
      sdtf generate "a (red:1.3) apple with [leaves]" --prompts-file more.txt
      sdtf generate --like outputs/a-house.png --steps 100
    """
    model = {name: drawing.pop(name) for name in MODEL}
    with errors_in_one_line():
        prompts += read_prompts(prompts_file)
        repeated = like is not None and not prompts and not changed(context)
        if like is not None:
            prompts = prompts or (like.prompt,)
            check_inputs(context, like)
        if not prompts:
            raise click.UsageError(
                "give a PROMPT, a --prompts-file with one a line, or a picture to draw --like"
            )
        if given(context, "input_image_strength") and drawing["input_image"] is None:
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
                text = png_text(readable(made), readable(facts))
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


@main.command(no_args_is_help=True)
@click.argument("picture", metavar="PNG", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="All settings exactly, of our own PNGs.")
def info(picture: str, as_json: bool) -> None:
    """Print how the picture in a PNG was drawn, by this program or by another.

    Others, such as A1111's web UI, leave the same text: the prompts, then the settings.
    """
    with errors_in_one_line():
        text = read_png_text(picture)
        key = KEYWORD if as_json else "parameters"
        if key not in text:
            raise ValueError(f"{picture} does not say how it was drawn: it has no text {key!r}.")
        click.echo(same_json(text[key], picture) if as_json else printable(text[key]))


def same_json(text: str, picture: str) -> str:
    """A stranger's JSON for the screen, in ASCII.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.dumps(json.loads(text), allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError(f"{picture} is damaged: its text {KEYWORD!r} is no JSON.") from None


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
    """A prompt as a file's name on any system: its words, lower case, joined by hyphens."""
    stem = "-".join(re.findall(r"\w+", prompt.lower()))[:STEM]
    stem = stem.encode()[:STEM_BYTES].decode(errors="ignore").strip("-")
    if not stem or re.fullmatch(DEVICES, stem):
        return f"picture-{stem}".rstrip("-")
    return stem


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


def with_options(message: str) -> str:
    """What an error says, with the command's options in the place of the API's parameters."""
    command = click.get_current_context().command
    # Those with an underscore, which are no English words; and not in quotes or a file's name.
    options = {one.name: one.opts[0] for one in command.params if "_" in one.name}
    options |= {"img_height": "--size", "img_width": "--size", "batch_size": "--batch"}
    name = r"""(?<![-\w'"./\\])\w+_\w+(?![-\w'"/\\]|\.\w)"""
    return re.sub(name, lambda match: options.get(match[0], match[0]), message)


@contextmanager
def warnings_once() -> Iterator[None]:
    """Within, what is logged for every prompt is shown for the first."""
    shown = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return message not in shown and not shown.add(message)

    logging.lastResort.addFilter(is_new)
    try:
        yield
    finally:
        logging.lastResort.removeFilter(is_new)


@contextmanager
def errors_in_one_line(drawing: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Reports what is wrong with the input, and Ctrl-C, without a traceback.

    Once `drawing()`, the arguments have been found right. Then only the model's files, the disk or
    an overflow can be at fault; any other error is one of the program, and shown in full.
    """
    try:
        yield
    except BrokenPipeError:  # who reads what is printed has had enough; click ends it quietly
        raise
    except (
        ValueError,
        OSError,
        ImportError,
        NotImplementedError,
        FloatingPointError,
        MemoryError,
    ) as error:
        mendable = CheckpointError | ChangedError | OSError | FloatingPointError | MemoryError
        if drawing() and not isinstance(error, mendable):
            raise
        message = " ".join(str(error).split()) or "there is not enough memory."
        message = re.sub(r"^\[Errno \d+\] ", "", message)
        if not isinstance(error, CheckpointError | OSError):  # of files, by their names
            message = with_options(message)
        click.echo(f"Error: {printable(message)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
