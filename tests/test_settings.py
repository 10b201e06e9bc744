import json
import re

import pytest

from stable_diffusion_tf.settings import KEYWORD, png_text, read_settings

SETTINGS = {
    "prompt": "a (red:1.2) apple, noto style",
    "seed": 7,
    "negative_prompt": None,
    "emphasis": True,
    "clip_skip": 1,
    "num_steps": 20,
    "reuse": 1,
    "unconditional_guidance_scale": 7.5,
    "rng": "numpy",
    "size": "512x768",
    "sampler": "dpmpp_2m",
    "schedule": None,
    "eta": 0.0,
    "guidance_rescale": 0.0,
    "input_image": None,
    "input_mask": None,
    "input_image_strength": 0.5,
    "mask_feather": 0.0,
    "weights": "someone/some-model",
    "vae": None,
    "prediction": None,
    "dtype": "float32",
    "jit_compile": False,
    "engine": None,
}
FACTS = {
    "version": "0.1.0",
    "model": "some-model",
    "unet_sha256": "0123456789abcdef" * 4,
    "decoder_sha256": "fedcba9876543210" * 4,
    "batch_seeds": [6, 7],
}


def parsed(parameters):
    """As A1111's web UI parses it: the prompts, and {label: value} of the last line."""
    *lines, last = parameters.strip().split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    unquoted = {k: json.loads(v) if v.startswith('"') else v for k, v in found}
    return prompt, negative.strip(), unquoted


def test_other_programs_read_the_parameters():
    text = png_text(SETTINGS, FACTS, "DPM++ 2M")["parameters"]
    assert text == (
        "a (red:1.2) apple, noto style\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: 7, "
        "Size: 512x768, Model hash: 0123456789, Model: some-model, Precision: float32, "
        "Version: stable-diffusion-tf 0.1.0"
    )
    assert parsed(text)[2]["Size"] == "512x768"


def test_what_was_unusual_is_said_and_quoted_where_a_program_would_stumble():
    unusual = {
        "negative_prompt": "blurry,\nSteps: 3",
        "emphasis": False,
        "clip_skip": 2,
        "reuse": 3,
        "unconditional_guidance_scale": 7.0,
        "rng": "torch",
        "schedule": "karras",
        "eta": 0.5,
        "guidance_rescale": 0.7,
        "input_image": "photo.png",
        "input_mask": 'some/folder/a "b", c.png',
        "input_image_strength": 0.6,
        "mask_feather": 4.0,
        "vae": "some/folder/vae.safetensors",
        "engine": "openvino",
    }
    made = png_text(SETTINGS | unusual, FACTS | {"model": "a, b: c"}, "")["parameters"]
    prompt, negative, fields = parsed(made)
    assert prompt == SETTINGS["prompt"]
    assert negative == "blurry,\nSteps: 3"
    assert fields == {
        "Steps": "20",
        "Sampler": "dpmpp_2m",
        "Schedule type": "Karras",
        "CFG scale": "7",
        "Seed": "7",
        "Size": "512x768",
        "Model hash": "0123456789",
        "Model": "a, b: c",
        "VAE hash": "fedcba9876",
        "VAE": "vae.safetensors",
        "Denoising strength": "0.6",
        "Image": "photo.png",
        "Mask": 'a "b", c.png',
        "Mask feather": "4",
        "Clip skip": "2",
        "Feature reuse": "3",
        "RNG": "CPU",
        "Emphasis": "None",
        "Eta DDIM": "0.5",
        "CFG rescale": "0.7",
        "Precision": "float32",
        "Engine": "openvino",
        "Version": "stable-diffusion-tf 0.1.0",
    }


def test_a_negative_prompt_without_guidance_had_no_part():
    unguided = {"negative_prompt": "blue", "unconditional_guidance_scale": 1.0}
    assert "blue" not in png_text(SETTINGS | unguided, FACTS)["parameters"]


def test_settings_come_back_exactly():
    settings = SETTINGS | {"prompt": 'a "café" 🍎\n', "eta": 0.1 + 0.2, "seed": 2**64 - 1}
    assert read_settings(png_text(settings, FACTS)) == (settings, FACTS)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{}",
        "7",
        '{"facts": []}',
        '{"eta": NaN, "facts": {}}',
        '{"prompt": ["a"], "facts": {}}',
        '{"facts": {}, "seed": ' + "9" * 5000 + "}",
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_damaged_settings_are_refused(damaged):
    with pytest.raises(ValueError, match="is damaged"):
        read_settings({KEYWORD: damaged})


def test_a_picture_of_another_program_has_none():
    with pytest.raises(ValueError, match="it was not made by `sdtf generate`"):
        read_settings({"parameters": "a cat\nSteps: 20"})
