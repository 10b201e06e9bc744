"""`sdtf weights`: models on a hub."""

from pathlib import Path
from typing import Any

import click

from stable_diffusion_tf.cli.terminal import errors_in_one_line


@click.group()
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
