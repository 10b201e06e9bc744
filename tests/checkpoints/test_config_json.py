import json
from dataclasses import replace

import pytest
from tiny import TINY, write_folder

from stable_diffusion_tf.checkpoints.config_json import read_config, write_config
from stable_diffusion_tf.config import (
    SD_1,
    SD_1_INPAINT,
    SD_2,
    SD_2_BASE,
    ScheduleConfig,
    TextEncoderConfig,
)

ZERO_SNR = replace(
    TINY,
    schedule=ScheduleConfig(
        betas="linear", beta_start=1e-4, beta_end=0.02, train_steps=500, prediction="v",
        spacing="trailing", offset=0, final_alpha_one=True, zero_terminal_snr=True,
    ),
)  # fmt: skip


@pytest.mark.parametrize("config", [TINY, SD_1, SD_1_INPAINT, SD_2_BASE, SD_2, ZERO_SNR])
def test_every_config_survives_the_round_trip(tmp_path, config):
    assert read_config(write_folder(tmp_path, config, {})) == config


def test_a_pad_token_without_a_name_is_not_saved():
    with pytest.raises(ValueError, match="pad_token 7"):
        write_config(replace(TINY, text_encoder=TextEncoderConfig(pad_token=7)))


SD_2_PUBLISHED = {  # what the keys that matter say in the published folder
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.8.0"},
    "text_encoder/config.json": {
        "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 23, "model_type": "clip_text_model",
    },
    "tokenizer/special_tokens_map.json": {"pad_token": "!"},
    "tokenizer/tokenizer_config.json": {"pad_token": "<|endoftext|>"},
    "unet/config.json": {
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
        "use_linear_projection": True, "only_cross_attention": False, "upcast_attention": True,
    },
    "vae/config.json": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "prediction_type": "v_prediction",
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    },
}  # fmt: skip


def write_published(folder, files):
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))


def test_absent_keys_have_the_published_defaults(tmp_path):
    write_published(tmp_path, SD_2_PUBLISHED)
    assert read_config(tmp_path) == replace(SD_2, name=tmp_path.name)


@pytest.mark.parametrize(
    ("files", "pad_token"),
    [
        ({}, 49407),
        ({"tokenizer_config.json": {"pad_token": "!"}}, 0),
        ({"tokenizer_config.json": {"pad_token": {"content": "!", "lstrip": False}}}, 0),
        ({"special_tokens_map.json": {}, "tokenizer_config.json": {"pad_token": "!"}}, 0),
    ],
)
def test_the_pad_token_is_read_from_the_tokenizer_folder(tmp_path, files, pad_token):
    parts = {k: v for k, v in SD_2_PUBLISHED.items() if not k.startswith("tokenizer/")}
    write_published(tmp_path, parts | {f"tokenizer/{name}": v for name, v in files.items()})
    assert read_config(tmp_path).text_encoder.pad_token == pad_token


@pytest.mark.parametrize(
    ("scheduler", "final_alpha_one"),
    [("PNDMScheduler", False), ("DDIMScheduler", True), ("EulerDiscreteScheduler", False)],
)
def test_a_scheduler_s_own_defaults_hold(tmp_path, scheduler, final_alpha_one):
    files = SD_2_PUBLISHED | {"scheduler/scheduler_config.json": {"_class_name": scheduler}}
    write_published(tmp_path, files)
    assert read_config(tmp_path).schedule == ScheduleConfig(
        betas="linear", beta_start=1e-4, beta_end=0.02, final_alpha_one=final_alpha_one
    )
