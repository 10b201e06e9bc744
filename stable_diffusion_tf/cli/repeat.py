"""`--like`: what a PNG says becomes the defaults of the command's options, by click's own means.

A stranger may have written it. It is text, read as click reads that of the command line, and only
for options that are a `Setting`; nothing else in a PNG has any effect.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from stable_diffusion_tf.arguments import MAX_PIXELS
from stable_diffusion_tf.checkpoints.hub import sha256
from stable_diffusion_tf.cli.options import Setting
from stable_diffusion_tf.cli.terminal import ChangedError
from stable_diffusion_tf.images import read_png_text
from stable_diffusion_tf.settings import read_settings

PATHS = ("weights", "vae", "input_image", "input_mask")


class Like(NamedTuple):
    """A PNG whose picture is to be drawn again, perhaps with changes."""

    path: str
    prompt: str
    seed: int
    facts: Mapping[str, Any]


def take_settings(context: click.Context, path: str) -> Like:
    """Makes the settings that a PNG has the defaults of the command's options.

    Raises:
        FileNotFoundError, ValueError: there is no such PNG; or it has no settings, or some that are
            damaged, unknown, out of range or dangerous.
    """
    text = read_png_text(path)
    try:
        settings, facts = read_settings(text)
        like = Like(path, settings.pop("prompt", None), settings.get("seed"), facts)
        given = {name: str(value) for name, value in settings.items() if value is not None}
        _check_facts(like, _checked(context, given))
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: {error}.") from None
    context.default_map = given
    return like


def taken(context: click.Context, name: str) -> bool:
    """Whether a setting is the PNG's, for want of one on the command line."""
    return context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def given(context: click.Context, name: str) -> bool:
    """Whether the command line has it."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def unusual(context: click.Context, name: str) -> bool:
    """Whether the command line has it, and other than by default."""
    return given(context, name) and context.params[name] != _options(context)[name].usual


def without_a_mask(context: click.Context) -> dict[str, Any]:
    """Settings that go with the PNG's picture, as usual, if the command line takes that away."""
    if not given(context, "input_image") or context.params["input_image"] is not None:
        return {}
    gone = [name for name in ("input_mask", "mask_feather") if taken(context, name)]
    for name in gone:
        context.set_parameter_source(name, ParameterSource.DEFAULT)
    return {name: _options(context)[name].usual for name in gone}


def changed(context: click.Context) -> bool:
    """Whether the command line has any setting or number of pictures of its own."""
    return any(
        given(context, option.name)
        for option in context.command.params
        if isinstance(option, Setting) or option.name == "batch"
    )


def check_inputs(context: click.Context, like: Like) -> None:
    """Raises ChangedError if the pictures that it was drawn over are gone or others by now."""
    for name in filter(partial(taken, context), ("input_image", "input_mask")):
        path = Path(context.params[name])
        if not path.is_file():
            state = "is not here"
        elif sha256(path) != like.facts.get(f"{name}_sha256"):
            state = "is another one now"
        else:
            continue
        raise ChangedError(
            f"{like.path} cannot be drawn again: its {name} {str(path)!r} {state}; give one with "
            f"{_options(context)[name].opts[0]}."
        )


def check_models(context: click.Context, like: Like, known: Callable[[str], bool]) -> None:
    """Raises ChangedError if what its settings name as a model is neither here nor `known`."""
    for name in filter(partial(taken, context), ("weights", "vae")):
        path = context.params[name]
        if not (Path(path).exists() or known(path)):
            raise ChangedError(
                f"{like.path} cannot be drawn again: its {name} {path!r} is not here; give one "
                f"with {_options(context)[name].opts[0]}."
            )


def check_config(context: click.Context, like: Like, facts: Mapping[str, Any]) -> None:
    """Raises ChangedError if the model that its settings name is configured otherwise by now.

    Another version may know more of a config, or name it otherwise.
    """
    if any(given(context, name) for name in ("weights", "vae", "prediction")):
        return
    then, now = ((one.get("version"), one.get("config_sha256")) for one in (like.facts, facts))
    if then[0] == now[0] and then[1] not in (None, now[1]):
        raise ChangedError(
            f"{like.path} cannot be drawn again: what its model's files say beside their weights "
            "is something else now; give a model with --weights."
        )


def check_batch(like: Like, width: int, height: int) -> None:
    """Raises ValueError if it was drawn with more pictures than may be drawn for its sake."""
    count = len(like.facts["batch_seeds"])
    if count * width * height > MAX_PIXELS:
        raise ValueError(
            f"{like.path} is of {count} pictures of {width}x{height} that were drawn at once, over "
            f"{MAX_PIXELS:,} pixels; give --seed {like.seed} to draw it alone"
        )


def check_network(context: click.Context, like: Like, part: str, its_hash: str) -> None:
    """Raises ChangedError if a network that its settings name is another by now."""
    autoencoder = part in ("encoder", "decoder")
    name = "vae" if autoencoder and context.params["vae"] is not None else "weights"
    # A network that the picture did not take, such as the encoder, has no hash there.
    if taken(context, name) and like.facts.get(f"{part}_sha256", its_hash) != its_hash:
        raise ChangedError(
            f"{like.path} cannot be drawn again: the {part} of {context.params[name]} is another "
            f"now, whose hash is {its_hash[:10]}; give one with {_options(context)[name].opts[0]}."
        )


def _options(context: click.Context) -> dict[str, Setting]:
    return {one.name: one for one in context.command.params if isinstance(one, Setting)}


def _checked(context: click.Context, given: Mapping[str, str]) -> dict[str, Any]:
    """Settings as click reads them; ValueError for one that this version has not, or not so."""
    options = _options(context)
    if unknown := sorted(given.keys() - options):
        names = ", ".join(map(repr, unknown[:5]))
        raise ValueError(f"this version has no settings {names}; a newer one may")
    read = {}
    for name, text in given.items():
        try:
            read[name] = options[name].type_cast_value(context, text)
        except click.BadParameter as error:
            raise ValueError(f"its {name}: {error.message.rstrip('.')}") from None
        # Windows would tell that computer who asks.
        if name in PATHS and PureWindowsPath(text).drive.startswith("\\\\"):
            raise ValueError(
                f"its {name} {text!r} is on another computer; if you trust that, give it with "
                f"{options[name].opts[0]}"
            )
    return read


def _check_facts(like: Like, read: Mapping[str, Any]) -> None:
    """Raises ValueError if what it takes to draw it is not all there, or the picture too large."""
    seeds = like.facts.get("batch_seeds")
    if not (
        isinstance(like.prompt, str)
        and read.get("size") is not None
        and isinstance(seeds, list)
        and all(type(seed) is int for seed in seeds)
        and like.seed in seeds
    ):
        raise ValueError("the text that says how to draw it is damaged")
    width, height = read["size"]
    if width * height > MAX_PIXELS:
        raise ValueError(f"it asks for a picture of {width}x{height}, over {MAX_PIXELS:,} pixels")
