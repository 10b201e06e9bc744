"""scripts/finetune.py on tiny models: what it trains, saves, goes on from and refuses."""

import shutil
from dataclasses import replace

import finetune
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file
from tiny import FILES, TINY

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part, load
from stable_diffusion_tf.checkpoints.save import save
from stable_diffusion_tf.config import AutoencoderConfig, UNetConfig
from stable_diffusion_tf.training.data import square

CAPTIONS = {"fox.png": "a red fox", "cat.JPG": "a cat, [sitting]", "owl.webp": "an owl"}
SMALL = replace(  # little to compile
    TINY,
    text_encoder=replace(TINY.text_encoder, layers=1),
    unet=UNetConfig(widths=(32,), resnets=1, attention=(True,), heads=(4,), context_width=32),
    autoencoder=AutoencoderConfig(widths=(32, 32), resnets=1),
    image_size=16,
)


def draw_pictures(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        pixels = rng.integers(0, 256, (20, 20 + 4 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{caption}\n")
    (folder / ".DS_Store").touch()
    return folder


def run(folder, *options, source="small", target="target"):
    """Runs the script on what is in `folder`, for two steps."""
    defaults = ["--dtype=float32", "--steps=2", "--batch-size=2", "--rate=1"]
    paths = [folder / source, folder / "pictures", folder / target]
    arguments = [*paths, f"--runs={folder / 'runs'}", *defaults, *options]
    return CliRunner().invoke(finetune.main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, pictures, and what the script has made of them; not to be changed."""
    folder = tmp_path_factory.mktemp("finetune")
    keras.utils.set_random_seed(0)
    models = {part: build_part(SMALL, part) for part in MODELS}
    save(Models(SMALL, **models), folder / "small")
    draw_pictures(folder / "pictures")
    result = run(folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with the same model and pictures, of one's own."""
    return shutil.copytree(
        trained, tmp_path / "own", ignore=shutil.ignore_patterns("runs", "target")
    )


def weights(folder):
    return {part: load_file(folder / file) for part, file in FILES.items()}


def changed(before, after):
    """Names of the tensors that differ; none may come or go."""
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_the_unet_alone_is_trained(trained):
    before, after = weights(trained / "small"), weights(trained / "target")
    assert changed(before["unet"], after["unet"]) == set(before["unet"])
    assert not changed(before["text_encoder"], after["text_encoder"])
    assert not changed(before["vae"], after["vae"])
    found = {path.name for path in (trained / "runs" / "target").iterdir()}
    assert found == {"loss.csv", "preview000002.png", "state.safetensors"}
    sd = StableDiffusion.from_pretrained(trained / "target")
    assert sd.generate("a red fox", num_steps=1, progress=False).shape == (1, 16, 16, 3)


def test_lora_is_saved_in_the_projections_and_goes_on_from_a_save(folder, monkeypatch):
    def draw(self, prompts, **options):  # quickly
        return np.zeros((len(prompts), 16, 16, 3), np.uint8)

    monkeypatch.setattr(StableDiffusion, "generate", draw)
    options = "--lora-rank=2", "--dtype=mixed_float16", "--save-every=1"
    result = run(folder, *options)
    assert result.exit_code == 0, result.output
    (folder / "target").rename(folder / "whole")
    state = folder / "runs" / "target" / "state.safetensors"
    state.unlink()  # as if killed after the first step's save
    assert run(folder, *options).exit_code == 0

    before, whole, pieces = (
        weights(folder / name)["unet"] for name in ("small", "whole", "target")
    )
    kinds = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    adapted = {name for name in before if ".attn" in name and name.endswith(kinds)}
    assert changed(before, whole) == adapted
    assert not changed(whole, pieces)
    for name in adapted:
        assert np.linalg.matrix_rank(whole[name] - before[name], tol=1e-3) == 2
    assert sum("/lora_kernel_" in name for name in load_file(state)) == 2 * len(adapted)


def test_a_run_of_other_captions_or_settings_is_not_gone_on_from(folder, trained):
    shutil.copytree(trained / "runs", folder / "runs")
    (folder / "pictures" / "fox.txt").write_text("a fox")
    result = run(folder, "--seed=1")
    assert result.exit_code == 2
    assert "another model, optimizer or recipe; differences: 2, first captions" in result.output
    assert "seed (then '0', now '1')" in result.output


def test_a_run_of_another_model_is_not_gone_on_from(folder, trained):
    shutil.copytree(trained / "runs", folder / "runs")
    result = run(folder, "--prediction=v")
    assert result.exit_code == 2
    assert "another model, optimizer or recipe; differences: 1, first config" in result.output
    models = load(folder / "small")
    models.text_encoder.weights[0].assign(models.text_encoder.weights[0] + 1)
    save(models, folder / "other")
    result = run(folder, source="other")
    assert result.exit_code == 2
    assert "another model, optimizer or recipe; differences: 1, first source" in result.output


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda folder: (folder / "fox.txt").unlink(), (), "fox.png: no caption. Write it into"),
        (lambda folder: (folder / "fox.txt").write_text(" "), (), "fox.png: no caption"),
        (lambda folder: (folder / "owl.webp").unlink(), (), "owl.txt: a caption without a picture"),
        (lambda folder: (folder / "fox.txt").write_bytes(b"\xff"), (), "fox.txt is not valid text"),
        (lambda folder: (folder / "fox.txt").write_text("fox " * 76), (), "fox.txt: 76 tokens and"),
        (lambda folder: (folder / "cat.JPG").write_text("?"), (), "cat.JPG is no picture in one"),
        (lambda folder: [p.unlink() for p in folder.iterdir()], (), "pictures has no pictures"),
        (
            lambda folder: folder.rename(folder.parent / "elsewhere"),
            (),
            "No such file or directory",
        ),
        (None, ("--batch-size=4",), "has too few pictures, 3, for a batch of 4"),
        (lambda folder: (folder.parent / "target").mkdir(), (), "target exists. Name another"),
        (None, ("--lora-rank=0",), "0 is not in the range x>=1"),
        (None, ("--rate=inf",), "inf is not in the range 0<x<=1"),
        (None, (f"--seed={2**32}",), "is not in the range"),
    ],
)
def test_what_is_refused_is_refused_before_any_work(
    tiny_model, tmp_path, monkeypatch, change, options, message
):
    monkeypatch.setattr(finetune, "load_parts", None)
    pictures = draw_pictures(tmp_path / "pictures")
    if change is not None:
        change(pictures)
    result = run(tmp_path, *options, source=tiny_model)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_none_or_for_inpainting_is_refused(tiny_inpainting, tmp_path):
    assert "its UNet is for inpainting" in run(tmp_path, source=tiny_inpainting).output
    assert "nowhere" in run(tmp_path, source="nowhere").output


def test_a_target_where_the_saves_go_is_refused(tiny_model, tmp_path):
    for target in ("runs", "runs/target"):
        result = run(tmp_path, source=tiny_model, target=target)
        assert result.exit_code == 2
        assert "is where the run itself writes" in result.output


def test_the_middle_of_a_picture_is_what_is_seen(tmp_path):
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = [[[10 * i, 0, 0] for i in range(4)]] * 4
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(square(tmp_path / "wide.png", 4), pixels[:, 3:7])
    assert square(tmp_path / "wide.png", 8).shape == (8, 8, 3)
