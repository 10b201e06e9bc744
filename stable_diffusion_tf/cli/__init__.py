"""The command line: arguments in, files out. What is slow to import waits for its use."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from stable_diffusion_tf.cli.draw import SAMPLERS_TABLE, generate
from stable_diffusion_tf.cli.hub import weights
from stable_diffusion_tf.cli.options import PREDICTION, VAE
from stable_diffusion_tf.cli.terminal import ensure_stderr, errors_in_one_line, quiet_import
from stable_diffusion_tf.images import read_png_text
from stable_diffusion_tf.screen import printable
from stable_diffusion_tf.settings import KEYWORD


class Commands(click.Group):
    """Which hints at `generate` where a prompt stands in a command's place."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            if " " in args[0]:
                error.message += f" A picture of it: sdtf generate {json.dumps(printable(args[0]))}"
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stable-diffusion-tf")
def main() -> None:
    """Stable Diffusion in Keras: pictures from text and pictures.

    \b
    Try:  sdtf generate "a red apple, noto style"
    """
    ensure_stderr()
    if getattr(sys.stdout, "errors", None) == "strict":  # a prompt may have what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")


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
            other = "; without --json it does" if "parameters" in text else ""
            raise ValueError(
                f"{picture} does not say how it was drawn: it has no text {key!r}{other}."
            )
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


@main.command()
def samplers() -> None:
    """List the samplers, one a line."""
    click.echo("\n".join(SAMPLERS_TABLE))


main.add_command(generate)
main.add_command(weights)
