"""scripts/train_emoji.py from artworks to a folder that draws, at a size that trains in seconds."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import train_emoji
from click.testing import CliRunner
from emoji_data import Row

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.checkpoints.load import load
from stable_diffusion_tf.checkpoints.save import save
from stable_diffusion_tf.config import AutoencoderConfig, TextEncoderConfig, UNetConfig

TINY = replace(
    train_emoji.EMOJI,
    text_encoder=TextEncoderConfig(width=32, layers=1, heads=4, mlp_width=64),
    unet=UNetConfig(widths=(32,), resnets=1, attention=(True,), heads=(4,), context_width=32),
    autoencoder=AutoencoderConfig(widths=(32, 32), resnets=1, scale=1.0),
    image_size=16,
)


@pytest.fixture
def artworks(monkeypatch):
    give(monkeypatch, train=64, unseen_concept=24)


def give(monkeypatch, **counts):
    """Makes `counts` of each split all the artworks there are."""
    rows = [
        Row("noto", "noto", "package", "icon", f"{i:x}", f"thing {i}", (), "", split)
        for split, count in counts.items()
        for i in range(count)
    ]
    images = np.random.default_rng(0).integers(0, 256, (len(rows), 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(train_emoji, "EMOJI", TINY)
    monkeypatch.setattr(train_emoji.emoji_data, "load", lambda size, cache: (rows, images))


@pytest.fixture
def stages(monkeypatch):
    """What the script has asked to train, its first batch drawn and nothing learnt."""
    asked = []

    def train(loss, batch, models, optimizer, **options):
        asked.append(SimpleNamespace(batch=batch(0), models=models, **options))

    monkeypatch.setattr(train_emoji, "train", train)
    return asked


def test_the_script_from_artworks_to_a_folder(artworks, stages, tmp_path):
    arguments = [tmp_path / "target", "--steps=7", f"--runs={tmp_path}"]
    CliRunner().invoke(train_emoji.main, list(map(str, arguments)), catch_exceptions=False)

    steps = {stage.folder.name: stage.steps for stage in stages}
    assert steps == {"autoencoder": 1400, "diffusion": 7, "decoder": 800}
    assert [len(stage.batch[0]) for stage in stages] == [32, 64, 16]
    assert [len(stage.models) for stage in stages] == [2, 2, 2]
    assert StableDiffusion.from_pretrained(tmp_path / "target").config.unet == TINY.unet


def test_the_decoder_is_trained_alone_or_not_at_all(artworks, stages, tmp_path):
    def run(target, *options):
        arguments = [str(tmp_path / target), f"--runs={tmp_path}", *options]
        CliRunner().invoke(train_emoji.main, arguments, catch_exceptions=False)
        return [len(stage.models) for stage in stages]

    assert run("first", "--decoder-steps=0") == [2, 2]
    stages.clear()
    start = f"--start={tmp_path / 'first'}"
    assert run("second", start, "--adversary-weight=0") == [2, 1]
    stages.clear()
    assert run("third", start, "--steps=0", "--adversary-weight=0") == [1]


def test_a_decoder_does_not_learn_from_a_random_network(stages, tmp_path):
    arguments = [str(tmp_path / "target"), f"--runs={tmp_path}", "--steps=0"]
    refused = CliRunner().invoke(train_emoji.main, arguments)
    assert refused.exit_code == 2 and "--steps 0 wants --start" in refused.output
    assert not stages


@pytest.mark.parametrize(
    "counts", [{"train": 63, "unseen_concept": 24}, {"train": 64}], ids=["batch", "preview"]
)
def test_too_few_artworks_are_an_error_before_anything_is_trained(
    counts, stages, tmp_path, monkeypatch
):
    give(monkeypatch, **counts)
    refused = CliRunner().invoke(train_emoji.main, [str(tmp_path / "target"), f"--runs={tmp_path}"])
    assert refused.exit_code == 1 and "are too few: a batch takes 64, a preview 1" in refused.output
    assert not stages


def test_an_autoencoders_save_is_of_its_seed_and_pictures(artworks, stages, tmp_path):
    _, images = train_emoji.emoji_data.load(16, tmp_path)
    for pictures, seed in ((images, 0), (images, 0), (images, 1), (images[::-1], 0)):
        train_emoji.train_autoencoder(pictures, images[:1], 1, seed, tmp_path, False, 400)
    first, again, *others = [stage.recipe for stage in stages]
    assert first == again
    assert first not in others


def test_a_save_is_of_the_model_and_the_captions_that_it_began_with(
    artworks, stages, tmp_path, monkeypatch
):
    def recipes(target, start):
        stages.clear()
        arguments = [str(tmp_path / target), f"--runs={tmp_path}", f"--start={tmp_path / start}"]
        CliRunner().invoke(train_emoji.main, arguments, catch_exceptions=False)
        return [stage.recipe for stage in stages]

    arguments = [str(tmp_path / "first"), f"--runs={tmp_path}"]
    CliRunner().invoke(train_emoji.main, arguments, catch_exceptions=False)
    models = load(tmp_path / "first")
    models.text_encoder.weights[0].assign(models.text_encoder.weights[0] + 1)
    save(models, tmp_path / "other")
    schedule = replace(models.config.schedule, spacing="trailing")
    config = replace(models.config, schedule=schedule)
    save(replace(load(tmp_path / "first"), config=config), tmp_path / "configured")

    found = recipes("second", "first")
    assert recipes("third", "first") == found
    for i, start in enumerate(("other", "configured")):
        diffusion, decoder = recipes(f"fourth{i}", start)
        assert diffusion != found[0] and decoder != found[1]
    rows, images = train_emoji.emoji_data.load(16, tmp_path)
    rows = [replace(row, label=f"{row.label}!") for row in rows]
    monkeypatch.setattr(train_emoji.emoji_data, "load", lambda size, cache: (rows, images))
    assert all(a != b for a, b in zip(recipes("fifth", "first"), found, strict=True))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.ckpt", ".ckpt is not written"),
        ("model.safetensors", "a single file has no config"),
        ("file/model", "file is a file; name another target"),
        ("runs", "is where the run itself writes"),
        ("runs/emoji", "is where the run itself writes"),
        ("runs/decoder", "is where the run itself writes"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    stages, tmp_path, target, message
):
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / target), f"--runs={tmp_path / 'runs'}"]
    refused = CliRunner().invoke(train_emoji.main, arguments)
    assert refused.exit_code == 2 and message in refused.output
    assert not stages and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2]), (7, [0, 2, 4])]
)
def test_previews_show_what_there_is(count, expected):
    assert train_emoji.spread(list(range(count)), 3) == expected


@pytest.mark.full
def test_flipped_pictures_have_latents_of_their_own(artworks, tmp_path, monkeypatch):
    _, images = train_emoji.emoji_data.load(16, tmp_path)
    seen = {}

    def train_diffusion(models, latents, captions, **options):
        seen.update(models=models, mean=latents[0], captions=captions)

    monkeypatch.setattr(train_emoji, "train_diffusion", train_diffusion)
    arguments = [tmp_path / "target", "--autoencoder-steps=1", f"--runs={tmp_path}", "--flip"]
    CliRunner().invoke(train_emoji.main, list(map(str, arguments)), catch_exceptions=False)

    models, again = seen["models"], images[:64, :, ::-1]
    mean, _ = train_emoji.posterior(models.encoder, again, models.config.autoencoder.scale)
    assert [row.mirrored for row in seen["captions"]] == 64 * [False] + 64 * [True]
    np.testing.assert_allclose(seen["mean"][64:], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_it_trains_goes_on_from_its_saves_and_keeps_what_is_there(artworks, tmp_path):
    def run(target, *options):
        steps = ["--autoencoder-steps=1", "--steps=1", "--decoder-steps=1"]
        arguments = [str(tmp_path / target), *steps, f"--runs={tmp_path}", *options]
        return CliRunner().invoke(train_emoji.main, arguments)

    assert run("first").exception is None
    state = tmp_path / "diffusion" / "state.safetensors"
    saved = state.stat().st_mtime_ns
    assert run("again").exception is None
    assert state.stat().st_mtime_ns == saved  # nothing was left to train
    drawn = [
        StableDiffusion.from_pretrained(tmp_path / target).generate(
            "thing 3, noto style", num_steps=1, seed=0, output="latents", progress=False
        )
        for target in ("first", "again")
    ]
    np.testing.assert_array_equal(*drawn)
    refused = run("first")
    assert refused.exit_code == 2 and "exists. Name another target" in refused.output

    shutil.rmtree(tmp_path / "diffusion")
    refused = run("third", "--shift=1")  # the decoder was trained for the network of the first
    assert "another model, optimizer or recipe; differences: 1, first start" in str(
        refused.exception
    )
