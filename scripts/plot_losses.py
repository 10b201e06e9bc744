"""Draws the loss of a training run, from the `loss.csv` in its folder: as logged, and smoothed."""

from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stable_diffusion_tf.images import free_path, save_png

WIDTH, HEIGHT, MARGIN = 1600, 800, 110  # twice what is saved: halving smooths the lines


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Means over the up to `span` values around each."""
    window = np.ones(min(span, len(values)))
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def ticks(low: float, high: float) -> np.ndarray:
    """Evenly spaced round numbers, about five to ten, the first not above `low` < `high`, the last
    not below `high`."""
    power = 10 ** np.floor(np.log10(high - low))
    spacing = next(s for s in (power, power / 2, power / 5) if (high - low) / s >= 4)
    return spacing * np.arange(np.floor(low / spacing), np.ceil(high / spacing) + 1)


def curve(steps: np.ndarray, losses: np.ndarray, span: int = 9) -> np.ndarray:
    """A picture of the losses over the steps, (N,) both, N at least 2: uint8 (400, 800, 3)."""
    xs, ys = ticks(0, steps[-1]), ticks(losses.min(), losses.max())
    font = ImageFont.load_default(size=26)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)

    def place(x, y):
        right = np.interp(x, xs[[0, -1]], [MARGIN, WIDTH - MARGIN])
        return right, np.interp(y, ys[[0, -1]], [HEIGHT - MARGIN, MARGIN / 2])

    for x in xs:
        draw.line([place(x, ys[0]), place(x, ys[-1])], fill="gainsboro", width=2)
        below = place(x, ys[0])[0], HEIGHT - MARGIN + 20
        draw.text(below, f"{x:,.0f}", fill="black", font=font, anchor="ma")
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], fill="gainsboro", width=2)
        draw.text(place(xs[0], y), f"{y:g}  ", fill="black", font=font, anchor="rm")
    draw.text((WIDTH / 2, HEIGHT - 10), "step", fill="black", font=font, anchor="md")
    draw.text((10, 10), "loss", fill="black", font=font)
    for values, colour, width in (
        (losses, "lightsteelblue", 3),
        (smoothed(losses, span), "navy", 5),
    ):
        points = [place(x, y) for x, y in zip(steps, values, strict=True)]
        draw.line(points, fill=colour, width=width, joint="curve")
    return np.asarray(picture.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS))


@click.command(help=__doc__)
@click.argument("log", default="runs/diffusion/loss.csv", type=click.Path(exists=True))
@click.option("--output", default="outputs", show_default=True, type=Path, help="A folder.")
def main(log: str, output: Path) -> None:
    rows = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2)
    if len(rows) < 2:
        raise click.ClickException(f"{log} has {len(rows)} losses, too few for a curve; train on")
    steps, losses = rows.T
    print(save_png(curve(steps, losses), free_path(output, "losses")))


if __name__ == "__main__":
    main()
