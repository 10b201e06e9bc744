"""Saves the mean of two models' weights as TARGET, a folder to load, in float16.

A model trained further on what it knows draws that better and what it never saw worse; between it
and what it was, both can be better than either (Wortsman et al. 2021, arXiv:2109.01903).
"""

from pathlib import Path

import click

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import

with errors_in_one_line(), quiet_import():
    from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
    from stable_diffusion_tf.checkpoints.load import MODELS, Models, load_parts
    from stable_diffusion_tf.checkpoints.save import check_target, save


@click.command(help=__doc__)
@click.argument("first")
@click.argument("second")
@click.argument("target", type=Path)
@click.option(
    "--share",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Of SECOND in the mean.",
)
def main(first: str, second: str, target: Path, share: float) -> None:
    with errors_in_one_line():
        check_target(target, "float16")
        one, other = open_checkpoint(first), open_checkpoint(second)
        check_target(target, "float16", one.config)
        if one.config.nameless() != other.config.nameless():
            raise ValueError(f"{first} and {second} differ in their configs: there is no mean")
        models, others = (load_parts(checkpoint, MODELS, "float32") for checkpoint in (one, other))
        for part in MODELS:
            for mean, weight in zip(models[part].weights, others[part].weights, strict=True):
                mean.assign((1 - share) * mean + share * weight)
        save(Models(one.config, **models), target, "float16")
        click.echo(target)


if __name__ == "__main__":
    main()
