"""One picture of image-to-image and inpainting: a picture, drawn over at rising strengths, and its
lower half repainted."""

from pathlib import Path

import click
import numpy as np

from stable_diffusion_tf.cli.terminal import errors_in_one_line, quiet_import
from stable_diffusion_tf.files import check_folder
from stable_diffusion_tf.images import contact_sheet, free_path, save_png

with errors_in_one_line(), quiet_import():
    from stable_diffusion_tf import StableDiffusion

STRENGTHS = (0.3, 0.5, 0.7, 0.9)
EDITS = (  # drawn first, then drawn over it, seed
    ("brown circle, noto style", "full moon, noto style", 7),
    ("globe showing Europe-Africa, blob style", "soccer ball, blob style", 3),
    ("disappointed face, noto style", "smiling face with sunglasses, noto style", 7),
)


@click.command(help=__doc__)
@click.option("--weights", default="emoji", show_default=True)
@click.option("--output", default="outputs", show_default=True, type=Path, help="A folder.")
def main(weights: str, output: Path) -> None:
    with errors_in_one_line():
        check_folder(output, "name another with --output")
        sd = StableDiffusion.from_pretrained(weights)
        lower_half = np.indices((sd.img_height, sd.img_width))[0] >= sd.img_height / 2
        pictures, labels = [], []
        for before, after, seed in EDITS:
            (first,) = sd.generate(before, seed=seed)
            pictures.append(first)
            labels.append(before)
            edits = [(strength, None, str(strength)) for strength in STRENGTHS]
            for strength, mask, label in (*edits, (1.0, lower_half, "lower half")):
                drawn = sd.generate(
                    after,
                    seed=seed,
                    input_image=first,
                    input_mask=mask,
                    input_image_strength=strength,
                )
                pictures.extend(drawn)
                labels.append(f"{label}: {after}")
        sheet = contact_sheet(np.stack(pictures), columns=2 + len(STRENGTHS), labels=labels)
        print(save_png(sheet, free_path(output, "editing_sheet")))


if __name__ == "__main__":
    main()
