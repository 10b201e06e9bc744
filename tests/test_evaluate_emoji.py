"""The metrics of scripts/evaluate_emoji.py, on made-up artworks whose answers are known."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from emoji_data import Row, caption
from evaluate_emoji import (
    SEEDS,
    Artworks,
    artworks_diversity,
    copy_baselines,
    diversity,
    gradient_energy,
    hits,
    main,
    mean_distance,
    psnr,
    sheet,
    thumbnails,
)

from stable_diffusion_tf.config import ModelConfig


def row(style: str, concept: int, split: str = "train") -> Row:
    return Row(style, style, "package", "icon", f"{concept:x}", f"thing {concept}", (), "", split)


@pytest.fixture
def artworks() -> Artworks:
    """Twelve concepts in three styles; "b" is "a" a little brighter, "c" has nothing in common.

    Never seen: 3 in style "a", 11 in any.
    """
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (12, 64, 64, 3), dtype=np.uint8)
    c = rng.integers(0, 200, (12, 64, 64, 3), dtype=np.uint8)
    held_out = {("a", 3): "unseen_pair"} | {(s, 11): "unseen_concept" for s in "abc"}
    rows = [row(s, i, held_out.get((s, i), "train")) for s in "abc" for i in range(12)]
    return Artworks(rows, np.concatenate([a, a + 5, c]))


def test_real_artworks_are_their_own_best_answer(artworks):
    ranks = [artworks.rank(artworks.thumbnails[i], i) for i in range(len(artworks.rows))]
    assert hits(ranks) == {"top1": 1, "top5": 1}


def test_a_wrong_concept_is_no_top1_hit(artworks):
    assert artworks.rank(artworks.thumbnails[1], asked=0) > 0


def test_artworks_alike_rank_alike():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8).repeat(2, axis=0)
    twins = Artworks([row("a", 0), row("a", 1)], images)
    assert [twins.rank(twins.thumbnails[0], i) for i in (0, 1)] == [0, 0]


def test_copies_are_the_training_artworks_of_the_concept_in_other_styles(artworks):
    assert artworks.copies(3) == [15, 27]
    assert artworks.copies(15) == [27]  # 3 is held out


def test_copying_style_b_answers_style_a_and_copying_c_is_chance(artworks):
    baselines = copy_baselines(artworks, [3])
    assert baselines["best_copy"] == {"top1": 1, "top5": 1}
    assert 0.5 <= baselines["random_copy"]["top1"] < 1


def test_nearest_of_another_style(artworks):
    assert artworks.nearest_is_of_another_style(artworks.thumbnails[15], asked=3)
    assert not artworks.nearest_is_of_another_style(artworks.thumbnails[0], asked=0)
    # the held-out artwork itself is not searched: its brighter twin is the nearest
    assert artworks.nearest_is_of_another_style(artworks.thumbnails[3], asked=3)


def test_chosen_lists_are_fixed_and_nested(artworks):
    assert artworks.chosen("unseen_pair") == [3]
    assert artworks.chosen("train", 5) == artworks.chosen("train", 9)[:5]
    assert 3 not in artworks.chosen("train")


def test_thumbnails_are_box_means():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, 0, 1, 2] = 255
    thumbnail = thumbnails(image).reshape(32, 32, 3)
    assert thumbnail[0, 0, 2] == pytest.approx(0.25)
    assert thumbnail.sum() == pytest.approx(0.25)


def test_thumbnails_refuse_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match="48 px"):
        thumbnails(np.zeros((1, 48, 48, 3), np.uint8))


def test_gradient_energy_of_a_step_edge():
    edge = np.zeros((1, 4, 5, 3), np.uint8)
    edge[:, :, 2:] = 255
    assert gradient_energy(edge) == pytest.approx(1 / 4)  # one of four differences along a row
    assert gradient_energy(np.full((1, 4, 4, 3), 9, np.uint8)) == 0


def test_psnr_of_a_constant_error():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(images, images + 10) == pytest.approx(20 * np.log10(25.5))


def test_sheet_pairs_real_and_drawn(artworks):
    real = artworks.images[:7]
    picture = sheet(["a thing"] * 7, real, real, ranks=[0] * 7)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 5 * 2 * 64  # five pairs a row


def test_mean_distance_of_three_greys():
    greys = np.array([0, 0.5, 1])[:, None] * np.ones(12)
    assert mean_distance(greys) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_diversity_is_that_of_the_seeds_not_of_the_prompts():
    prompts, seeds = np.array([0, 100]), 3 * np.arange(len(SEEDS))
    greys = (prompts[:, None] + seeds).reshape(-1, 1, 1, 1) * np.ones((32, 32, 3))
    between = mean_distance(seeds[:, None] / 255)
    assert diversity(greys.astype(np.uint8)) == pytest.approx(between, rel=1e-5)


def test_diversity_of_artworks_is_within_a_style():
    greys = np.array([0, 51, 200, 251], np.uint8)[:, None, None, None] * np.ones((32, 32, 3), "u1")
    rows = [row(style, i) for i, style in enumerate("aabb")]
    assert artworks_diversity(Artworks(rows, greys)) == pytest.approx(0.2)


class PerfectModel:
    """Draws the asked artwork itself; its autoencoder loses nothing."""

    img_height = 64
    config = ModelConfig(name="perfect", guidance=2.0)

    def __init__(self, artworks: Artworks):
        captions = map(caption, artworks.rows)
        self._pictures = dict(zip(captions, artworks.images, strict=True))

    def generate(self, prompts, num_steps, unconditional_guidance_scale, seed, emphasis, progress):
        return np.stack([self._pictures[prompt] for prompt in prompts])

    def encode_image(self, images):
        return images

    def decode(self, latents):
        return latents


def test_a_perfect_model_has_perfect_figures(artworks, tmp_path, monkeypatch):
    class StableDiffusion:
        from_pretrained = staticmethod(lambda source: PerfectModel(artworks))

    class StyleClassifier:
        """Knows all artworks by heart."""

        def __init__(self, styles, size):
            named = zip(artworks.images, artworks.styles, strict=True)
            self._styles = {image.tobytes(): style for image, style in named}

        def train(self, images, styles):
            # every training artwork, and again through the autoencoder
            assert len(images) == len(styles) == 2 * len(artworks.chosen("train"))

        def __call__(self, images):
            return np.array([self._styles[image.tobytes()] for image in images])

    monkeypatch.setattr("stable_diffusion_tf.StableDiffusion", StableDiffusion, raising=False)
    monkeypatch.setattr("style_classifier.StyleClassifier", StyleClassifier)
    monkeypatch.setattr("emoji_data.load", lambda size, cache: (artworks.rows, artworks.images))

    file = tmp_path / "new" / "figures.json"
    arguments = ["--prompts", "7", "--batch", "3", "--output", tmp_path, "--json", file]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)

    assert result.exit_code == 0
    figures = json.loads(file.read_text())
    assert figures["guidance"] == 2.0  # the model's own
    assert figures["autoencoder"]["psnr"] > 60
    assert figures["style_classifier"] == {"accuracy": 1, "accuracy_rebuilt": 1}
    assert figures["diversity"]["artworks"] > 0
    for split in ("train", "unseen_pair", "unseen_concept"):
        assert figures["diversity"][split] == 0  # it draws the artwork, whatever the seed
    assert (tmp_path / "evaluation-diversity.png").exists()
    for split, count in (("train", 7), ("unseen_pair", 1)):
        assert figures[split]["prompts"] == count
        assert figures[split]["top1"] == figures[split]["top5"] == 1
        assert figures[split]["sharpness"] == pytest.approx(1)
        assert figures[split]["asked_style"] == figures[split]["asked_style_over_accuracy"] == 1
        assert (tmp_path / f"evaluation-{split}.png").exists()
