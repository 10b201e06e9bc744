"""The published sizes, rebuilt from their names and shapes: 5 GB on disk, 12 GB of memory."""

import gc
import json
import shutil

import numpy as np
import pytest
import synth
from tiny import write_folder

from stable_diffusion_tf.checkpoints.load import load_parts
from stable_diffusion_tf.config import SD_1, SD_1_INPAINT, SD_2_BASE

pytestmark = pytest.mark.full

MODELS = {
    "sd15": (SD_1, {"text_encoder": "sd15_text_encoder", "unet": "sd15_unet", "vae": "sd15_vae"}),
    "sd21": (
        SD_2_BASE,
        {"text_encoder": "sd21_text_encoder", "unet": "sd21_unet", "vae": "sd15_vae"},
    ),
}
PARAMETERS = {
    "text_encoder": 123_060_480,
    "unet": 859_520_964,
    "encoder": 34_163_664,
    "decoder": 49_490_199,
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """(name, folder) of a whole model in the diffusers layout."""
    config, names = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    for part, name in names.items():  # one at a time, to hold one in memory
        write_folder(folder, config, {part: synth.weights(name)})
    yield request.param, folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()


def check_unet(unet, name):
    golden = synth.golden(name)
    width = unet.config.context_width
    for i in range(sum(key.startswith("eps") for key in golden)):
        latents = synth.inputs(f"A{name}/latents{i}", golden[f"shape{i}"])
        context = synth.inputs(f"A{name}/context{i}", (len(latents), 77, width))
        noise = unet([latents, golden[f"timesteps{i}"], context])
        assert synth.relative_error(noise, golden[f"eps{i}"]) <= 2e-5


def test_text_encoder(checkpoint):
    name, folder = checkpoint
    model = load_parts(folder, ["text_encoder"])["text_encoder"]
    golden = synth.golden(f"{name}_text_encoder")
    assert synth.relative_error(model(golden["ids"]), golden["last_hidden_state"]) <= 2e-5
    if name == "sd15":
        assert model.count_params() == PARAMETERS["text_encoder"]


def test_unet(checkpoint):
    name, folder = checkpoint
    model = load_parts(folder, ["unet"])["unet"]
    check_unet(model, f"{name}_unet")
    if name == "sd15":
        assert model.count_params() == PARAMETERS["unet"]


def test_autoencoder(checkpoint):
    _, folder = checkpoint
    golden = synth.golden("sd15_vae")
    encoder = load_parts(folder, ["encoder"])["encoder"]
    images = np.tanh(synth.inputs("Asd15_vae/image", golden["image_shape"]))
    assert synth.relative_error(encoder(images), golden["moments"]) <= 2e-5
    assert encoder.count_params() == PARAMETERS["encoder"]

    decoder = load_parts(folder, ["decoder"])["decoder"]
    latents = synth.inputs("Asd15_vae/latents", golden["latents_shape"])
    scaled = latents * np.float32(decoder.config.scale)
    assert synth.relative_error(decoder(scaled), golden["decoded"]) <= 2e-5
    assert decoder.count_params() == PARAMETERS["decoder"]


def test_inpainting_unet(checkpoint):
    name, folder = checkpoint
    if name != "sd15":
        pytest.skip("SD 1.x only")
    keys = dict(json.loads((synth.DATA / "sd15_unet.json").read_text()))
    keys["conv_in.weight"] = (320, 9, 3, 3)
    weights = {key: synth.weight(key, shape) for key, shape in keys.items()}
    write_folder(folder, SD_1_INPAINT, {"unet": weights})
    del weights
    check_unet(load_parts(folder, ["unet"])["unet"], "sd15_inpaint_unet")
