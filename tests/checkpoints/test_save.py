import os
from dataclasses import replace

import numpy as np
import pytest
import synth
from safetensors.numpy import load_file
from tiny import FILES

from stable_diffusion_tf.checkpoints.catalog import open_checkpoint
from stable_diffusion_tf.checkpoints.load import MODELS, load
from stable_diffusion_tf.checkpoints.save import save


@pytest.fixture
def models(tiny_folder):
    return load(tiny_folder)


def test_what_is_saved_is_what_was_loaded(tmp_path, models, tiny_weights):
    save(models, tmp_path / "saved", dtype="float32")

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


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path, models):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match="tiny exists"):
        save(models, tmp_path / "tiny")
    with pytest.raises(ValueError, match="float16, bfloat16, not 'int8'"):
        save(models, tmp_path / "saved", dtype="int8")
    bias = models.decoder.get_layer("decoder.conv_in").bias
    bias.assign(np.full(bias.shape, 1e6))
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias .* not finite in float16"):
        save(models, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusers_opens_what_is_saved(tmp_path, models, prediction):
    import torch
    from diffusers import StableDiffusionPipeline

    schedule = replace(models.config.schedule, prediction=prediction, spacing="trailing")
    save(
        replace(models, config=replace(models.config, schedule=schedule)),
        tmp_path / "saved",
        dtype="float32",
    )
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", tokenizer=None)

    assert theirs.scheduler.config.timestep_spacing == "trailing"
    assert (
        theirs.scheduler.config.prediction_type
        == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    )
    assert theirs.unet.config.sample_size * theirs.vae_scale_factor == models.config.image_size
    text, unet, vae = (synth.golden(f"tiny_{part}") for part in FILES)
    with torch.no_grad():
        states = theirs.text_encoder(torch.tensor(text["ids"])).last_hidden_state
        noise = theirs.unet(
            torch.tensor(synth.inputs("Atiny_unet/latents0", unet["shape0"]).transpose(0, 3, 1, 2)),
            torch.tensor(unet["timesteps0"]),
            torch.tensor(synth.inputs("Atiny_unet/context0", (2, 77, 32))),
        ).sample
        latents = synth.inputs("Atiny_vae/latents", vae["latents_shape"])
        images = theirs.vae.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    assert synth.relative_error(states, text["last_hidden_state"]) <= 2e-5
    assert synth.relative_error(noise, unet["eps0"].transpose(0, 3, 1, 2)) <= 2e-5
    assert synth.relative_error(images, vae["decoded"].transpose(0, 3, 1, 2)) <= 2e-5
