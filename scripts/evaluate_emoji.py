"""Figures of the embedded emoji model: does it draw what was asked, in the style that was asked?

Every picture is drawn with the model's own defaults from "<label>, <style> style", lists and seeds
fixed, and compared with all artworks of the asked style at 32x32 RGB, by Euclidean distance. It is
a top-5 hit when the asked artwork is among the five nearest. Whether it is in the asked style is
told by a classifier that has learnt the styles from the training artworks, and from some of them
through the autoencoder, whose mark is no style. Diversity is the mean distance of pictures that
differ in their seeds only.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import emoji_data
import numpy as np
from emoji_data import Row
from tqdm import tqdm

from stable_diffusion_tf.cli.terminal import quiet_import
from stable_diffusion_tf.files import atomic_path
from stable_diffusion_tf.images import contact_sheet, free_path, save_png

SEED = 0
REBUILT = 2000  # training artworks that the style classifier sees through the autoencoder too
SHEET = 40  # pictures on a sheet: the first of the list, good or bad
SEVERAL = 12  # prompts of a split whose diversity is measured; a third of them is on its sheet
SEEDS = range(SEED, SEED + 8)  # of each of them


class Artworks:
    """All artworks, and how near a picture comes to them."""

    def __init__(self, rows: Sequence[Row], images: np.ndarray):
        """`rows` of the index and their pictures, uint8 (N, S, S, 3)."""
        self.rows = rows
        self.images = images
        self.thumbnails = thumbnails(images)
        self.styles = np.array([row.style for row in rows])
        self._train = np.array([row.split == "train" for row in rows])

    def chosen(self, split: str, count: int | None = None) -> list[int]:
        """Indices of `count` artworks of the split, or all: always the same, in the same order."""
        indices = [i for i, row in enumerate(self.rows) if row.split == split]
        return np.random.default_rng(SEED).permutation(indices)[:count].tolist()

    def rank(self, thumbnail: np.ndarray, asked: int) -> int:
        """How many artworks of the asked one's style are nearer to the picture than it is.

        0 is a top-1 hit, below 5 a top-5 hit. Artworks alike to the last bit rank alike.
        """
        same_style = np.flatnonzero(self.styles == self.styles[asked])
        distances = _distances(thumbnail, self.thumbnails[same_style])
        return int((distances < distances[same_style == asked]).sum())

    def copies(self, asked: int) -> list[int]:
        """The asked concept's training artworks in other styles: what one could copy."""
        row = self.rows[asked]
        return [
            i
            for i, other in enumerate(self.rows)
            if self._train[i] and other.hexcode == row.hexcode and other.style != row.style
        ]

    def nearest_is_of_another_style(self, thumbnail: np.ndarray, asked: int) -> bool:
        """Whether the nearest of all training artworks is of another style than the asked one."""
        distances = np.where(self._train, _distances(thumbnail, self.thumbnails), np.inf)
        return bool(self.styles[distances.argmin()] != self.styles[asked])


def _distances(thumbnail: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.square(others - thumbnail).sum(axis=1)


def thumbnails(images: np.ndarray, size: int = 32) -> np.ndarray:
    """uint8 (N, S, S, 3), S a multiple of `size` -> float32 (N, 3 * size**2) in [0, 1], box means.

    Raises:
        ValueError: S is no multiple of `size`.
    """
    count, side = images.shape[:2]
    if side % size:
        raise ValueError(f"Pictures of {side} px cannot be box-averaged to {size} px.")
    block = side // size
    blocks = images.reshape(count, size, block, size, block, 3)
    return (blocks.mean(axis=(2, 4), dtype=np.float32) / 255).reshape(count, -1)


def hits(ranks: Sequence[int]) -> dict[str, float]:
    """Shares of top-1 and top-5 hits."""
    ranks = np.asarray(ranks)
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


def copy_baselines(artworks: Artworks, asked: Sequence[int]) -> dict[str, dict[str, float]]:
    """The figures of answering with another style's artwork of the asked concept.

    `random_copy` is the expectation over a style drawn at random, `best_copy` that of an oracle
    which always draws the nearest style.
    """
    ranks = [[artworks.rank(artworks.thumbnails[j], i) for j in artworks.copies(i)] for i in asked]
    means = [hits(per_style) for per_style in ranks]
    return {
        "random_copy": {key: float(np.mean([m[key] for m in means])) for key in means[0]},
        "best_copy": hits([min(per_style) for per_style in ranks]),
    }


def gradient_energy(images: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, uint8 (N, S, S, 3) taken as [0, 1]."""
    unit = images.astype(np.float32) / 255
    return float(sum(np.square(np.diff(unit, axis=axis)).mean() for axis in (1, 2)))


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, in dB; uint8 (N, S, S, 3) both."""
    error = np.square(images.astype(np.float32) - others).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-2))).mean())


def batches(count: int, size: int, name: str) -> Sequence[slice]:
    return tqdm([slice(i, i + size) for i in range(0, count, size)], desc=name, unit="batch")


def reconstruct(sd, images: np.ndarray, batch: int) -> np.ndarray:
    """Through the autoencoder and back: uint8, same shape."""
    parts = batches(len(images), batch, "autoencoder")
    return np.concatenate([sd.decode(sd.encode_image(images[part])) for part in parts])


def draw(
    sd,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch: int,
    name: str,
) -> np.ndarray:
    """A picture a prompt and seed, uint8 (N, S, S, 3)."""
    return np.concatenate(
        [
            sd.generate(
                prompts[part],
                num_steps=steps,
                unconditional_guidance_scale=guidance,
                seed=seeds[part],
                emphasis=False,  # as in training: names have brackets, "A button (blood type)"
                progress=False,
            )
            for part in batches(len(prompts), batch, name)
        ]
    )


def sheet(
    prompts: Sequence[str], real: np.ndarray, drawn: np.ndarray, ranks: Sequence[int]
) -> np.ndarray:
    """Real artwork and picture side by side, over place among the nearest and prompt."""
    pairs = np.concatenate([real, drawn], axis=2)[:SHEET]
    labels = [f"{rank + 1}: {text}" for rank, text in zip(ranks, prompts, strict=True)]
    return contact_sheet(pairs, columns=5, labels=labels[:SHEET])


def mean_distance(pictures: np.ndarray) -> float:
    """Mean over pairs of the N pictures, (N, values), of their root mean square difference."""
    first, second = np.triu_indices(len(pictures), k=1)
    return float(np.sqrt(np.square(pictures[first] - pictures[second]).mean(axis=1)).mean())


def diversity(drawn: np.ndarray) -> float:
    """Mean distance of a prompt's pictures, which follow each other: (prompts * seeds, S, S, 3)."""
    found = thumbnails(drawn)
    return float(np.mean([mean_distance(p) for p in found.reshape(-1, len(SEEDS), found.shape[1])]))


def artworks_diversity(artworks: Artworks, count: int = 100) -> float:
    """Mean distance of different artworks of one style, over `count` of each: diversity's scale."""
    chosen = np.array(artworks.chosen("train"))
    by_style = [chosen[artworks.styles[chosen] == style] for style in np.unique(artworks.styles)]
    return float(np.mean([mean_distance(artworks.thumbnails[i[:count]]) for i in by_style]))


@click.command(help=__doc__)
@click.option("--weights", default="emoji", show_default=True, help="Preset or folder.")
@click.option("--prompts", default=600, show_default=True, help="Of a split, at most.")
@click.option("--steps", default=25, show_default=True)
@click.option("--guidance", type=float, help="The model's own unless given.")
@click.option("--batch", default=25, show_default=True, help="Pictures at a time.")
@click.option("--cache", default=emoji_data.CACHE, show_default=True, type=Path)
@click.option("--output", default="outputs", show_default=True, type=Path, help="Sheets' folder.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    weights: str,
    prompts: int,
    steps: int,
    guidance: float | None,
    batch: int,
    cache: Path,
    output: Path,
    json_file: Path | None,
) -> None:
    with quiet_import():  # here: the metrics are tested without Keras
        from style_classifier import StyleClassifier

        from stable_diffusion_tf import StableDiffusion

    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    sd = StableDiffusion.from_pretrained(weights)
    artworks = Artworks(*emoji_data.load(sd.img_height, cache))
    guidance = sd.config.guidance if guidance is None else guidance
    figures = {"weights": weights, "steps": steps, "guidance": guidance, "seed": SEED}

    held_out = artworks.chosen("unseen_pair") + artworks.chosen("unseen_concept")
    unseen = artworks.images[held_out]
    rebuilt = reconstruct(sd, unseen, batch)
    figures["autoencoder"] = {
        "psnr": psnr(unseen, rebuilt),
        "sharpness": gradient_energy(rebuilt) / gradient_energy(unseen),
    }

    known = artworks.chosen("train")
    again = reconstruct(sd, artworks.images[known[:REBUILT]], batch)
    classifier = StyleClassifier(artworks.styles, sd.img_height)
    classifier.train(
        np.concatenate([artworks.images[known], again]),
        artworks.styles[known + known[:REBUILT]],
    )
    accuracy = float((classifier(unseen) == artworks.styles[held_out]).mean())
    figures["style_classifier"] = {
        "accuracy": accuracy,
        "accuracy_rebuilt": float((classifier(rebuilt) == artworks.styles[held_out]).mean()),
    }

    for split in ("train", "unseen_pair"):
        asked = artworks.chosen(split, prompts)
        texts = [emoji_data.caption(artworks.rows[i]) for i in asked]
        seeds = range(SEED, SEED + len(texts))
        drawn = draw(sd, texts, seeds, steps, guidance, batch, split)
        real = artworks.images[asked]
        found = thumbnails(drawn)
        ranks = [artworks.rank(picture, i) for picture, i in zip(found, asked, strict=True)]
        in_style = float((classifier(drawn) == artworks.styles[asked]).mean())
        figures[split] = {
            "prompts": len(asked),
            **hits(ranks),
            "sharpness": gradient_energy(drawn) / gradient_energy(real),
            "asked_style": in_style,
            "asked_style_over_accuracy": in_style / accuracy,
            **copy_baselines(artworks, asked),
            "nearest_of_another_style": float(
                np.mean(
                    [
                        artworks.nearest_is_of_another_style(picture, i)
                        for picture, i in zip(found, asked, strict=True)
                    ]
                )
            ),
        }
        save_png(sheet(texts, real, drawn, ranks), free_path(output, f"evaluation-{split}"))

    figures["diversity"] = {"artworks": artworks_diversity(artworks)}
    shown, labels = [], []
    for split in ("train", "unseen_pair", "unseen_concept"):
        asked = artworks.chosen(split, min(prompts, SEVERAL))
        texts = [emoji_data.caption(artworks.rows[i]) for i in asked for _ in SEEDS]
        seeds = list(SEEDS) * len(asked)
        drawn = draw(sd, texts, seeds, steps, guidance, batch, f"{split}, {len(SEEDS)} seeds")
        figures["diversity"][split] = diversity(drawn)
        on_sheet = slice(SEVERAL // 3 * len(SEEDS))
        shown.extend(drawn[on_sheet])
        labels.extend(texts[on_sheet])
    seeds_sheet = contact_sheet(np.stack(shown), columns=len(SEEDS), labels=labels)
    save_png(seeds_sheet, free_path(output, "evaluation-diversity"))

    text = json.dumps(figures, indent=2)
    print(text)
    if json_file is not None:
        with atomic_path(json_file) as part:
            part.write_text(text + "\n")


if __name__ == "__main__":
    main()
