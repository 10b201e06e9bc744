"""One picture that shows what the embedded model can do: a row a prompt, a column a style."""

from pathlib import Path

import click

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import
from stable_diffusion_tf.files import check_folder
from stable_diffusion_tf.images import contact_sheet, free_path, save_png

with errors_in_one_line(), quiet_import():
    from stable_diffusion_tf import StableDiffusion

STYLES = ("noto", "blob", "fluent", "flat", "twemoji", "emojione", "firefox")
CONCEPTS = (
    "red apple",
    "cat face",
    "octopus",
    "rocket",
    "mushroom",
    "house with garden",
    "robot",
    "rainbow",
)


@click.command(help=__doc__)
@click.option("--weights", default="emoji", show_default=True)
@click.option("--output", default="outputs", show_default=True, type=Path, help="A folder.")
@click.option("--steps", default=25, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(weights: str, output: Path, steps: int, seed: int) -> None:
    prompts = [f"{concept}, {style} style" for concept in CONCEPTS for style in STYLES]
    with errors_in_one_line():
        check_folder(output, "name another with --output")
        sd = StableDiffusion.from_pretrained(weights)
        images = sd.generate(prompts, num_steps=steps, seed=seed)
        sheet = contact_sheet(images, columns=len(STYLES), labels=prompts)
        click.echo(save_png(sheet, free_path(output, "contact_sheet")))


if __name__ == "__main__":
    main()
