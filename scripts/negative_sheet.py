"""One picture of negative prompts: each picture beside the one that the same seed gives when it is
drawn away from something."""

from pathlib import Path

import click
import numpy as np

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import
from stable_diffusion_tf.files import check_folder
from stable_diffusion_tf.images import contact_sheet, free_path, save_png

with errors_in_one_line(), quiet_import():
    from stable_diffusion_tf import StableDiffusion

SEEDS = (1, 2, 3)
PROMPTS = (  # what is drawn, and what it is drawn away from
    ("smiling face with heart-eyes, noto style", "red heart, noto style"),
    ("apple, noto style", "green apple, noto style"),
    ("heart, noto style", "red heart, noto style"),
)


@click.command(help=__doc__)
@click.option("--weights", default="emoji", show_default=True)
@click.option("--output", default="outputs", show_default=True, type=Path, help="A folder.")
def main(weights: str, output: Path) -> None:
    with errors_in_one_line():
        check_folder(output, "name another with --output")
        sd = StableDiffusion.from_pretrained(weights)
        pictures, labels = [], []
        for prompt, negative in PROMPTS:
            negatives = ["", negative] * len(SEEDS)
            seeds = np.repeat(SEEDS, 2).tolist()
            pictures.extend(sd.generate([prompt] * len(seeds), negatives, seed=seeds))
            labels.extend([prompt, f"not: {negative}"] * len(SEEDS))
        sheet = contact_sheet(np.stack(pictures), columns=2 * len(SEEDS), labels=labels)
        print(save_png(sheet, free_path(output, "negative_sheet")))


if __name__ == "__main__":
    main()
