import os
import re
import tracemalloc
from dataclasses import replace

import keras
import numpy as np
import pytest
import synth
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny import FILES, TINY

from stable_diffusion_tf import pipeline
from stable_diffusion_tf.checkpoints import readers
from stable_diffusion_tf.checkpoints import save as checkpoints_save
from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part, load
from stable_diffusion_tf.checkpoints.readers import SafetensorsFile
from stable_diffusion_tf.checkpoints.save import check_target, convert, export, save, write_file
from stable_diffusion_tf.config import SD_1, SD_1_INPAINT, SD_2, SD_2_BASE
from stable_diffusion_tf.tokenizer import Tokenizer


@pytest.fixture
def models(tiny_folder):
    return load(tiny_folder)


def test_what_is_saved_is_what_was_loaded(tmp_path, models, tiny_weights):
    save(models, tmp_path / "saved")

    assert open_checkpoint(tmp_path / "saved").config == models.config
    for part, file in FILES.items():
        saved = load_file(tmp_path / "saved" / file)
        assert saved.keys() == tiny_weights[part].keys()
        for name, tensor in tiny_weights[part].items():
            np.testing.assert_array_equal(saved[name], tensor)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once(tmp_path, models, dtype):
    save(models, tmp_path / "one", dtype=dtype)
    loaded = load(tmp_path / "one")
    save(loaded, tmp_path / "two", dtype=dtype)

    for file in FILES.values():
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for part in MODELS:
        for before, after in zip(
            getattr(models, part).weights, getattr(loaded, part).weights, strict=True
        ):
            np.testing.assert_allclose(after, before, rtol=2**-8, atol=1e-7)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_what_is_saved_is_as_open_to_others_as_any_new_file(tmp_path, models):
    (tmp_path / "any").touch()
    save(models, tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*.*"):
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_each_file_is_put_on_the_disk_once(tmp_path, models, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    save(models, tmp_path / "saved")
    assert len(synced) == len(files(tmp_path))


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, models, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(readers, "save_file", full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=r"saved could not be written: .*No space left"):
        save(models, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == before


def test_what_came_meanwhile_is_not_replaced(tmp_path, models, monkeypatch):
    target = tmp_path / "saved.safetensors"
    monkeypatch.setattr(checkpoints_save, "check_target", lambda *_: None)
    monkeypatch.setattr(checkpoints_save, "write_file", lambda *_: target.write_text("theirs"))
    with pytest.raises(FileExistsError, match=r"saved\.safetensors exists"):
        save(models, target)
    assert target.read_text() == "theirs"


def test_a_name_may_be_as_long_as_any(tmp_path, models):
    save(models, tmp_path / (240 * "n"))
    assert (tmp_path / (240 * "n") / "model_index.json").exists()


def test_weights_are_not_copied_to_be_written(models):
    for part in ("unet", "text_encoder"):
        for array in export(part, getattr(models, part)).values():
            assert array.flags.c_contiguous
    tracemalloc.start()
    arrays = export("unet", models.unet).values()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * sum(array.nbytes for array in arrays)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path, models):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match="tiny exists"):
        save(models, tmp_path / "tiny")
    with pytest.raises(ValueError, match="float16, bfloat16, not 'int8'"):
        save(models, tmp_path / "saved", dtype="int8")
    bias = models.decoder.get_layer("decoder.conv_in").bias
    bias.assign(np.full(bias.shape, 1e6))
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias .* not finite in float16"):
        save(models, tmp_path / "saved", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_encoder": replace(TINY.text_encoder, layers=65)},
            "saved could not be read again: text_encoder.config.json: num_hidden_layers = 65",
        ),
        ({"image_size": 65}, "saved: a folder cannot hold image_size = 65"),
    ],
)
def test_a_folder_that_would_not_be_read_again_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path / "saved", "float32", replace(TINY, **changes))


def test_a_config_of_lists_is_saved(tmp_path):
    unet = replace(TINY.unet, widths=list(TINY.unet.widths))
    check_target(tmp_path / "saved", "float32", replace(TINY, unet=unet))


def test_a_folder_has_all_that_others_need(tmp_path, models):
    save(models, tmp_path / "new" / "saved")
    saved = {p.relative_to(tmp_path / "new" / "saved").as_posix() for p in files(tmp_path)}
    assert saved == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
        *FILES.values(),
    }


def files(folder):
    return [path for path in folder.rglob("saved/**/*") if path.is_file()]


def test_one_file_has_the_original_s_names(tmp_path, models, tiny_weights):
    write_file(models, tmp_path / "saved.safetensors", dtype="float32")

    saved = load_file(tmp_path / "saved.safetensors")
    assert len(saved) == sum(len(weights) for weights in tiny_weights.values())
    assert saved["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_one_file_is_read_again(tmp_path, models, prediction):
    schedule = replace(TINY.schedule, prediction=prediction)
    write_file(
        replace(models, config=replace(TINY_2, schedule=schedule)),  # OpenCLIP's names
        tmp_path / "saved.safetensors",
        dtype="float32",
    )
    metadata = SafetensorsFile(tmp_path / "saved.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == prediction
    checkpoint = open_checkpoint(tmp_path / "saved.safetensors", config=TINY_2)
    for part in ("text_encoder", "encoder", "decoder"):
        for match in checkpoint.match(part, getattr(models, part).weights):
            found = match.read()
            np.testing.assert_array_equal(found, np.asarray(match.variable))


V = replace(SD_1.schedule, prediction="v")


@pytest.mark.parametrize(
    "config",
    [
        SD_1,
        SD_1_INPAINT,
        SD_2_BASE,
        SD_2,
        replace(SD_1, schedule=V),
        replace(SD_2_BASE, unet=replace(SD_2_BASE.unet, in_channels=9), schedule=V),
    ],
)
def test_a_published_model_may_be_one_file(tmp_path, config):
    check_target(tmp_path / "new.safetensors", "float32", replace(config, name="of my own"))


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (replace(SD_1, guidance=3.0), "guidance = 3.0"),
        (replace(SD_1, image_size=768), "image_size = 768"),
        (replace(SD_2_BASE, schedule=V), "image_size = 512"),  # it would be taken for SD_2
        (replace(SD_1, schedule=replace(V, zero_terminal_snr=True)), "zero_terminal_snr = True"),
        (replace(SD_1, schedule=replace(V, spacing="trailing")), "schedule.spacing = trailing"),
        (replace(SD_1, schedule=replace(V, beta_end=0.02)), "schedule.beta_end = 0.02"),
        (replace(SD_1, autoencoder=replace(SD_1.autoencoder, scale=1.0)), "autoencoder.scale = 1"),
        (replace(SD_1, unet=replace(SD_1.unet, heads=(4,) * 4)), "unet.heads = (4, 4, 4, 4)"),
        (TINY, "text_encoder.width = 32"),
    ],
)
def test_what_one_file_cannot_say_is_refused(tmp_path, config, lost):
    with pytest.raises(ValueError, match=re.escape(lost)):
        check_target(tmp_path / "new.safetensors", "float32", config)
    check_target(tmp_path / "new", "float32", config)


def test_what_one_file_cannot_say_is_refused_before_weights_are_read(
    tmp_path, tiny_folder, monkeypatch
):
    def unexpected(*_):
        raise AssertionError("weights are read")

    for module in (pipeline, checkpoints_save):
        monkeypatch.setattr(module, "load_parts", unexpected)
    target = tmp_path / "new.safetensors"
    with pytest.raises(ValueError, match="Name a folder, which keeps it all"):
        convert(tiny_folder, target)
    with pytest.raises(ValueError, match="Name a folder, which keeps it all"):
        pipeline.StableDiffusion.from_pretrained(tiny_folder).save_pretrained(target)


def test_conversion_refuses_before_it_loads(tmp_path, tiny_folder):
    convert(tiny_folder, tmp_path / "new", "bfloat16")
    assert open_checkpoint(tmp_path / "new").config == TINY
    for target, dtype, message in (
        (tmp_path / "new", "float32", "new exists"),
        (tmp_path / "a.ckpt", "float32", r"\.ckpt is not written; name a folder, or end in \.safe"),
        (tmp_path / "a.keras", "float32", r"\.keras is not written; name a folder"),
        (tmp_path / "a", "float8", "not 'float8'"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            convert(tmp_path / "no such model", target, dtype)


TINY_2 = replace(  # as SD 2.x differs from 1.x
    TINY,
    text_encoder=replace(TINY.text_encoder, activation="gelu", pad_token=0),
    unet=replace(TINY.unet, linear_projection=True, heads=(2, 4)),
)
PROMPTS = ["a red apple", "Ünïcode 東京 🚀, don't"]  # no "!": as the pad token, it is theirs alone


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("config", [TINY, TINY_2], ids=["1.x", "2.x"])
@pytest.mark.parametrize("target", ["saved", "saved.safetensors"])
def test_diffusers_opens_what_is_saved(tmp_path, config, target):
    import torch
    from diffusers import StableDiffusionPipeline

    schedule = replace(config.schedule, prediction="v", spacing="trailing")
    config = replace(config, schedule=schedule)
    keras.utils.set_random_seed(0)
    models = Models(config, **{part: build_part(config, part) for part in MODELS})
    save(models, tmp_path / "saved", dtype="float32")
    if target == "saved":
        theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    else:
        write_file(models, tmp_path / target, dtype="float32")
        theirs = StableDiffusionPipeline.from_single_file(
            str(tmp_path / target), config=str(tmp_path / "saved"), local_files_only=True
        )

    assert theirs.scheduler.config.timestep_spacing == "trailing"
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    assert theirs.unet.config.sample_size * theirs.vae_scale_factor == config.image_size
    ids = theirs.tokenizer(PROMPTS, padding="max_length", return_tensors="np").input_ids
    ours = Tokenizer().tokenize(PROMPTS, pad_token=config.text_encoder.pad_token)
    np.testing.assert_array_equal(ids, ours)

    latents = synth.inputs("saved/latents", (2, 8, 6, 4))
    context = synth.inputs("saved/context", (2, 77, 32))
    images = np.tanh(synth.inputs("saved/images", (2, 16, 12, 3)))
    timesteps = np.array([981.0, 1.0], np.float32)

    def torch_of(images):
        return torch.tensor(images.transpose(0, 3, 1, 2))

    with torch.no_grad():
        states = theirs.text_encoder(torch.tensor(ids)).last_hidden_state
        noise = theirs.unet(
            torch_of(latents), torch.tensor(timesteps), torch.tensor(context)
        ).sample
        moments = theirs.vae.encode(torch_of(images)).latent_dist.parameters
        decoded = theirs.vae.decode(torch_of(latents)).sample
    for found, expected in (
        (models.text_encoder(ours), states),
        (models.unet([latents, timesteps, context]), noise.permute(0, 2, 3, 1)),
        (models.encoder(images), moments.permute(0, 2, 3, 1)),
        (models.decoder(latents * config.autoencoder.scale), decoded.permute(0, 2, 3, 1)),
    ):
        assert synth.relative_error(found, expected.numpy()) <= 2e-5
