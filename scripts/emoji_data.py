"""The emoji artworks that the embedded default model is trained and measured on.

`emoji_index.csv` beside this file lists them: style, icon, Unicode label, tags, split. The artworks
come from the npm registry, where Iconify publishes each set as one JSON file of SVG bodies:

    rows, images = emoji_data.load(64)  # fetched and drawn at first use, then read from the cache

Needs `npm` and the `train` extra (resvg_py). The splits are `train`; `unseen_pair` (concept known
from other styles, never seen in this one); `unseen_concept` (never seen in any style).
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from stable_diffusion_tf.files import atomic_path

INDEX = Path(__file__).with_name("emoji_index.csv")
CACHE = Path(__file__).resolve().parent.parent / "runs" / "emoji"
DRAWN = 256  # pixels an artwork is drawn at before it is scaled down: softer, truer edges

VERSIONS = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
}


@dataclass(frozen=True)
class Row:
    """One artwork: what it shows, in which style, and where it comes from."""

    style: str
    design: str  # styles of one design family share their hold-outs
    package: str
    icon: str
    hexcode: str  # the concept
    label: str
    tags: tuple[str, ...]
    group: str
    split: str
    mirrored: bool = False  # left for right, which its captions say

    @property
    def key(self) -> str:
        return f"{self.package}@{VERSIONS[self.package]}/{self.icon}"


def read_index(path: Path = INDEX) -> list[Row]:
    """All artworks of the index, in its order."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(**{**row, "tags": tuple(filter(None, row["tags"].split(";")))})
            for row in csv.DictReader(file)
        ]


def load(size: int, cache: Path = CACHE) -> tuple[list[Row], np.ndarray]:
    """Rows of the index and their pictures, uint8 (N, size, size, 3) on white, in the same order.

    The first call fetches the icon sets and draws them (some minutes); later ones read
    `emoji<size>.npz` in `cache`, which is drawn anew when the index or a version changes.
    """
    rows = read_index()
    keys = np.array([row.key for row in rows])
    file = Path(cache) / f"emoji{size}.npz"
    if file.exists():
        with np.load(file) as saved:
            if np.array_equal(saved["keys"], keys):
                return rows, saved["images"]
    images = draw_all(rows, size, Path(cache))
    with atomic_path(file) as part, open(part, "wb") as stream:
        np.savez_compressed(stream, keys=keys, images=images)
    return rows, images


def draw_all(rows: list[Row], size: int, cache: Path) -> np.ndarray:
    """Draw the artworks of `rows`: uint8 (N, size, size, 3)."""
    icon_sets = {package: read_icons(fetch(package, cache)) for package in VERSIONS}
    images = np.empty((len(rows), size, size, 3), np.uint8)
    for i, row in enumerate(tqdm(rows, desc=f"drawing at {size} px", unit="icon")):
        images[i] = draw(svg(icon_sets[row.package], row.icon), size)
    return images


def fetch(package: str, cache: Path) -> Path:
    """The package's tarball in `cache`; fetched with `npm pack` unless it is already there."""
    version = VERSIONS[package]
    cache.mkdir(parents=True, exist_ok=True)
    tarball = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"{package}: npm is needed to fetch the emoji artworks and is not installed. Install"
            f" Node.js, or put the package's tarball at {tarball}"
        )
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"fetching {package} {version}")
        command = [npm, "pack", "--silent", "--pack-destination", folder, f"{package}@{version}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        os.replace(Path(folder) / tarball.name, tarball)
    return tarball


def read_icons(tarball: Path) -> dict:
    """The Iconify set (`icons`, `width`, `height`, ...) in an npm tarball."""
    with tarfile.open(tarball) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def svg(icon_set: dict, name: str) -> str:
    """The SVG text of one icon, its view box padded to a square around the middle."""
    icon = icon_set["icons"][name]  # the index names no aliases
    left, top, width, height = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}">'
        f"{icon['body']}</svg>"
    )


def draw(text: str, size: int) -> np.ndarray:
    """Draw an SVG of square view box on white: uint8 (size, size, 3)."""
    import resvg_py  # the train extra's; reading a drawn cache needs it not

    drawn = max(DRAWN, size)
    png = resvg_py.svg_to_bytes(
        svg_string=text, width=drawn, height=drawn, background="#ffffff", skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def captions(row: Row, rng: np.random.Generator) -> str:
    """A caption of the artwork, drawn at random; a tenth name no style, a tenth nothing else.

    The empty caption of classifier-free guidance is not among them: the training loop drops
    captions itself.
    """
    tags = rng.permutation(row.tags)[:2].tolist() if row.tags else []
    whole = [
        caption(row),
        f"{article(row.label)} {row.label}, {row.style} style",
        f"{row.style} emoji of {row.label}",
        ", ".join([row.label, *tags, f"{row.style} style"]),
    ]
    tenths = [row.label, f"{row.style} style", *8 * [rng.choice(whole).item()]]
    text = rng.choice(tenths).item()
    return f"{text}, mirrored" if row.mirrored else text


def caption(row: Row) -> str:
    """The plain caption, the one that figures are measured with."""
    return f"{row.label}, {row.style} style"


def mirrored(rows: Sequence[Row], images: np.ndarray) -> tuple[list[Row], np.ndarray]:
    """The artworks left for right, pictures uint8 (N, S, S, 3), with captions that say so.

    Twice as much to learn from, and what other captions ask for, but the empty one, is as it was
    (Karras et al. 2022, arXiv:2206.00364, section 5, tell the network likewise).
    """
    return [replace(row, mirrored=True) for row in rows], images[:, :, ::-1]


def article(noun: str) -> str:
    """'a' or 'an', by sound: an apple, a unicorn, an hourglass, an SOS button."""
    vowel = re.match(r"[aeiou]|hour|(NG|SOS)\b", noun, re.IGNORECASE)
    return "an" if vowel and not re.match(r"uni|eu|ew|one\b", noun, re.IGNORECASE) else "a"


@click.command(help=__doc__.splitlines()[0])
@click.option("--size", default=64, show_default=True, help="Pixels a side.")
@click.option("--cache", default=CACHE, type=Path, show_default=True)
def main(size: int, cache: Path) -> None:
    rows, images = load(size, cache)
    print(f"{len(rows)} artworks, {images.shape}, in {cache}")


if __name__ == "__main__":
    main()
