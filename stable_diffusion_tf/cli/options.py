"""The command's own kinds of options, and those that several commands have."""

import re
from functools import partial
from typing import Any

import click

from stable_diffusion_tf.samplers import SAMPLERS, get_sampler


class Option(click.Option):
    """One of which an empty value is the default, whatever a PNG says."""

    def __init__(self, *args: Any, default: Any = None, **attributes: Any):
        super().__init__(*args, default=default, **attributes)
        self.usual = default

    def type_cast_value(self, context: click.Context, value: Any) -> Any:
        return super().type_cast_value(context, self.usual if value == "" else value)


class Setting(Option):
    """What the picture depends on: stored in its PNG, by the name of `generate`'s parameter."""


option = partial(click.option, cls=Option)
setting = partial(click.option, cls=Setting)


class SamplerName(click.Choice):
    """One of ours; by the name that another program has for it, it is told."""

    def __init__(self) -> None:
        super().__init__(list(SAMPLERS))

    def convert(self, value: Any, param: Any, context: Any) -> str:
        try:
            get_sampler(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return value


class Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, int]:
        """ "64" or "64x96" -> (width, height)."""
        match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", str(value))
        if not match:
            self.fail(f"{value!r} is neither a side (512) nor WIDTHxHEIGHT (512x768)", param)
        return int(match[1]), int(match[2] or match[1])


class Karras(click.types.BoolParamType):
    """On or off -> what `generate` calls `schedule`: "karras" or None."""

    name = "karras"

    def convert(self, value: Any, param: Any, context: Any) -> str | None:
        return "karras" if value == "karras" or super().convert(value, param, context) else None


# How a model is opened, where that is more than its name.
VAE = setting("--vae", metavar="PATH", help="Another autoencoder: a file, or a folder with one.")
PREDICTION = setting(
    "--prediction",
    type=click.Choice(["epsilon", "v"]),
    help="What the model's network predicts, whatever its own files say.",
)
