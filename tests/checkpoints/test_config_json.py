import json
import math
from dataclasses import replace

import pytest
from tiny import TINY, write_folder

from stable_diffusion_tf.checkpoints.config_json import read_config, write_config
from stable_diffusion_tf.checkpoints.readers import CheckpointError
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


SCHEDULER = "scheduler/scheduler_config.json"


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
    ("values", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a scheduler of betas"),
        ({"_class_name": "EDMEulerScheduler"}, "a scheduler of betas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_schedulers_of_other_noise_are_refused(tmp_path, values, message):
    write_published(tmp_path, SD_2_PUBLISHED | {SCHEDULER: values})
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "final_alpha_one"),
    [("PNDMScheduler", False), ("DDIMScheduler", True), ("EulerDiscreteScheduler", False)],
)
def test_a_scheduler_s_own_defaults_hold(tmp_path, scheduler, final_alpha_one):
    files = SD_2_PUBLISHED | {SCHEDULER: {"_class_name": scheduler}}
    write_published(tmp_path, files)
    assert read_config(tmp_path).schedule == ScheduleConfig(
        betas="linear", beta_start=1e-4, beta_end=0.02, final_alpha_one=final_alpha_one
    )


DPM_SOLVER = {  # as diffusers 0.35 writes it
    "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.35.0",
    "algorithm_type": "dpmsolver++", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
    "final_sigmas_type": "zero", "flow_shift": 1.0, "lambda_min_clipped": -math.inf,
    "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2,
    "solver_type": "midpoint", "steps_offset": 0, "thresholding": False,
    "timestep_spacing": "linspace", "trained_betas": None, "use_karras_sigmas": False,
    "variance_type": None,
}  # fmt: skip


def test_an_infinity_in_a_scheduler_s_file_is_read(tmp_path):
    write_published(tmp_path, SD_2_PUBLISHED | {SCHEDULER: DPM_SOLVER})
    assert "-Infinity" in (tmp_path / SCHEDULER).read_text()
    assert read_config(tmp_path).schedule == replace(SD_2.schedule, spacing="linspace")
    for key in ("beta_start", "beta_end"):
        write_published(tmp_path, {SCHEDULER: DPM_SOLVER | {key: math.inf}})
        with pytest.raises(CheckpointError, match=f"{key} = inf is not supported"):
            read_config(tmp_path)


def test_the_offset_is_what_diffusers_pipelines_set(tmp_path):
    """But in a folder of our own, which says what it means."""
    index = SD_2_PUBLISHED["model_index.json"]
    scheduler = SD_2_PUBLISHED[SCHEDULER]
    for own, said, offset in (({}, 0, 1), ({}, 2, 1), ({"_stable_diffusion_tf": {}}, 0, 0)):
        files = {"model_index.json": index | own, SCHEDULER: scheduler | {"steps_offset": said}}
        write_published(tmp_path, SD_2_PUBLISHED | files)
        assert read_config(tmp_path).schedule.offset == offset


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_clipping_is_turned_off_as_in_diffusers_pipelines(tmp_path, kind):
    write_published(
        tmp_path,
        SD_2_PUBLISHED
        | {"model_index.json": {"_class_name": f"StableDiffusion{kind}Pipeline"}}
        | {SCHEDULER: SD_2_PUBLISHED[SCHEDULER] | {"clip_sample": True}},
    )
    if kind == "Inpaint":  # which leaves it on
        with pytest.raises(CheckpointError, match="clip_sample = True is not supported"):
            read_config(tmp_path)
    else:
        assert read_config(tmp_path).schedule == SD_2.schedule


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
def test_schedulers_that_diffusers_saves_are_read_as_its_pipelines_take_them(tmp_path):
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    write_published(tmp_path, SD_2_PUBLISHED)
    for name in KarrasDiffusionSchedulers.__members__:
        if name in ("EDMEulerScheduler", "DPMSolverSDEScheduler"):  # no betas; wants torchsde
            continue
        scheduler = getattr(diffusers, name)(**betas)
        scheduler.save_pretrained(tmp_path / "scheduler")
        read = read_config(tmp_path).schedule
        for kind in ("", "Img2Img"):
            pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
            taken = pipeline(**nothing, scheduler=scheduler, requires_safety_checker=False)
            config = taken.scheduler.config
            assert config.get("steps_offset", 1) == read.offset, name
            assert not config.get("clip_sample", False), name
            assert config.get("timestep_spacing") == read.spacing, name
