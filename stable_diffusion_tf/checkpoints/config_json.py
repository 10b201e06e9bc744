"""The JSON files of a diffusers-style folder <-> our configs.

An absent key has the value diffusers and transformers give it. What our models cannot do is
refused by name: `SUPPORTED` lists the values of the keys that only have one.
"""

import math
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stable_diffusion_tf.checkpoints.readers import CheckpointError, read_json
from stable_diffusion_tf.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)

OURS = "_stable_diffusion_tf"  # diffusers ignores keys of model_index.json with an underscore

SUPPORTED: dict[str, dict[str, Any]] = {
    "text_encoder": {"model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "out_channels": 3,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "scheduler": {"thresholding": False, "trained_betas": None, "use_flow_sigmas": False},
}

# No model has more, and a network of a billion layers would take forever to fail to load.
MOST = 2**16  # of channels, tokens, timesteps
LAYERS = 64
LEVELS = 8

INPAINT = "StableDiffusionInpaintPipeline"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", INPAINT)
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
PAD_TOKENS = {"!": 0, "<|endoftext|>": 49407}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
BETAS = ("linear", "scaled_linear")
NO_BETAS = r"^(Flow|EDM|CM|Cosine|KarrasVe|VQ|IPNDM|ScoreSde)"  # schedulers of other kinds of noise
SPACINGS = ("leading", "trailing", "linspace")
ACTIVATIONS = ("quick_gelu", "gelu")


class Fields:
    """A JSON file's values, each checked as it is taken."""

    def __init__(self, path: Path):
        self.path = path
        self.values = read_json(path)

    def refuse(self, key: str, supported: str) -> None:
        raise CheckpointError(
            f"{self.path}: {key} = {self.values.get(key)!r} is not supported; {supported} is."
        )

    def only(self, supported: dict[str, Any]) -> None:
        for key, value in supported.items():
            if self.values.get(key, value) != value:
                self.refuse(key, repr(value))

    def integer(self, key: str, default: int, least: int = 1, most: int = MOST) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float, below: float = math.inf) -> float:
        value = self.values.get(key, default)
        if not _is_finite(value) or not 0 < value < below:
            limit = "" if below == math.inf else f" below {below}"
            self.refuse(key, f"a positive number{limit}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, known: Collection[str], default: str | None) -> Any:
        """One of the `known` words; None if the key is absent and has no default."""
        value = self.values.get(key, default)
        if value is None and key not in self.values:
            return None
        if not isinstance(value, str) or value not in known:
            self.refuse(key, " or ".join(map(repr, known)))
        return value

    def per_level(self, key: str, default: Any, levels: int | None = None) -> tuple[int, ...]:
        """Positive integers, one a level; a single one stands for all."""
        value = self.values.get(key, default)
        values = [value] * (levels or 1) if type(value) is int else value
        counts = range(1, LEVELS + 1) if levels is None else [levels]
        if (
            not isinstance(values, list | tuple)
            or not all(type(v) is int and 0 < v <= MOST for v in values)
            or len(values) not in counts
        ):
            self.refuse(
                key, f"one integer from 1 to {MOST} a level, of {counts[0]} to {counts[-1]} levels,"
            )
        return tuple(values)

    def same(self, key: str, default: int, levels: int, most: int = MOST) -> int:
        """One positive integer for every level."""
        values = self.per_level(key, default, levels)
        if len(set(values)) > 1 or values[0] > most:
            self.refuse(key, f"the same number at every level, {most} at most,")
        return values[0]


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON's integers know no limit."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_config(folder: Path, name: str | None = None) -> ModelConfig:
    """The config of the model in a diffusers-style folder.

    Args:
        folder: what has a `model_index.json`.
        name: the model's, if the index does not say it; None: the folder's.

    Raises:
        CheckpointError: it is another architecture, its parts do not fit together, or a file is
            not what it should be; the message names file, key and value.
    """
    index = Fields(folder / "model_index.json")
    if index.values.get("_class_name") not in PIPELINES:
        index.refuse("_class_name", " or ".join(PIPELINES))
    ours = index.values.get(OURS, {})
    if not isinstance(ours, dict):
        index.refuse(OURS, "an object")

    text_encoder = _read_text_encoder(folder)
    autoencoder = read_autoencoder(folder / "vae" / "config.json")
    fields = Fields(folder / "unet" / "config.json")
    unet = _read_unet(fields)
    if unet.context_width != text_encoder.width:
        fields.refuse("cross_attention_dim", f"the text encoder's hidden_size {text_encoder.width}")
    if unet.out_channels != autoencoder.latent_channels:
        fields.refuse("out_channels", f"the VAE's latent_channels {autoencoder.latent_channels}")
    if unet.in_channels not in (unet.out_channels, 2 * unet.out_channels + 1):
        fields.refuse(
            "in_channels", f"{unet.out_channels}, or {2 * unet.out_channels + 1} for inpainting,"
        )
    guidance = ours.get("guidance", ModelConfig.guidance)
    if not _is_finite(guidance):
        index.refuse(OURS, "a finite guidance in it")
    return ModelConfig(
        name=str(ours.get("name", name or folder.resolve().name)),
        text_encoder=text_encoder,
        unet=unet,
        autoencoder=autoencoder,
        schedule=_read_schedule(Fields(folder / "scheduler" / "scheduler_config.json"), index),
        image_size=fields.integer("sample_size", 64) * autoencoder.factor,
        guidance=float(guidance),
    )


def _read_text_encoder(folder: Path) -> TextEncoderConfig:
    fields = Fields(folder / "text_encoder" / "config.json")
    fields.only(SUPPORTED["text_encoder"])
    config = TextEncoderConfig(
        vocab_size=fields.integer("vocab_size", 49408, least=49408),  # all that the tokenizer has
        max_length=fields.integer("max_position_embeddings", 77, least=3),  # start, a token, end
        width=fields.integer("hidden_size", 512),
        layers=fields.integer("num_hidden_layers", 12, most=LAYERS),
        heads=fields.integer("num_attention_heads", 8),
        mlp_width=fields.integer("intermediate_size", 2048),
        activation=fields.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
        pad_token=_read_pad_token(folder / "tokenizer"),
    )
    if config.width % config.heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size {config.width}")
    return config


def _read_pad_token(folder: Path) -> int:
    """SD 2.x names "!" in special_tokens_map.json, which wins over tokenizer_config.json."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        fields = Fields(folder / name)
        token = fields.values.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(token, str) or token not in PAD_TOKENS:
            fields.refuse("pad_token", " or ".join(map(repr, PAD_TOKENS)))
        return PAD_TOKENS[token]
    return TextEncoderConfig.pad_token


def _read_unet(fields: Fields) -> UNetConfig:
    fields.only(SUPPORTED["unet"])
    widths = fields.per_level("block_out_channels", [320, 640, 1280, 1280])
    levels = len(widths)
    names = fields.values.get("down_block_types", [*[DOWN[True]] * 3, DOWN[False]])
    if (
        not isinstance(names, list)
        or len(names) != levels
        or not all(name in DOWN.values() for name in names)
    ):
        fields.refuse("down_block_types", f"{' or '.join(DOWN.values())}, {levels} times,")
    attention = tuple(name == DOWN[True] for name in names)
    mirror = [UP[attend] for attend in reversed(attention)]
    if fields.values.get("up_block_types", mirror) != mirror:
        fields.refuse("up_block_types", f"the mirror of down_block_types, {mirror},")
    config = UNetConfig(
        in_channels=fields.integer("in_channels", 4),
        out_channels=fields.integer("out_channels", 4),
        widths=widths,
        resnets=fields.same("layers_per_block", 2, levels, LAYERS),
        attention=attention,
        heads=fields.per_level("attention_head_dim", 8, levels),
        context_width=fields.same("cross_attention_dim", 1280, levels),
        linear_projection=fields.flag("use_linear_projection", False),
        groups=fields.integer("norm_num_groups", 32),
    )
    attends = (*attention[:-1], True)  # the middle block, of the last width, always does
    if any(a and w % h for a, w, h in zip(attends, widths, config.heads, strict=True)):
        fields.refuse("attention_head_dim", f"a number of heads that divides each of {widths}")
    _check_groups(fields, widths, config.groups)
    return config


def read_autoencoder(path: Path) -> AutoencoderConfig:
    """What `vae/config.json` says. Errors as of `read_config`."""
    fields = Fields(path)
    fields.only(SUPPORTED["vae"])
    widths = fields.per_level("block_out_channels", [64])
    for key, name in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if fields.values.get(key, [name]) != [name] * len(widths):
            fields.refuse(key, f"{name!r} at each of the {len(widths)} levels")
    config = AutoencoderConfig(
        widths=widths,
        resnets=fields.integer("layers_per_block", 1, most=LAYERS),
        latent_channels=fields.integer("latent_channels", 4),
        groups=fields.integer("norm_num_groups", 32),
        scale=fields.number("scaling_factor", 0.18215),
    )
    _check_groups(fields, widths, config.groups)
    return config


def _check_groups(fields: Fields, widths: tuple[int, ...], groups: int) -> None:
    if any(width % groups for width in widths):
        fields.refuse("norm_num_groups", f"a divisor of each of block_out_channels {widths}")


def _read_schedule(fields: Fields, index: Fields) -> ScheduleConfig:
    """The schedule as diffusers' pipelines take it, which overrule the scheduler's file.

    All of them set the offset to 1; all but inpainting's turn `clip_sample` off.
    """
    fields.only(SUPPORTED["scheduler"])
    if re.search(NO_BETAS, str(fields.values.get("_class_name"))):
        fields.refuse("_class_name", "a scheduler of betas, such as DDIMScheduler,")
    if index.values["_class_name"] == INPAINT:
        fields.only({"clip_sample": False})
    ours = OURS in index.values
    return ScheduleConfig(
        betas=fields.choice("beta_schedule", BETAS, "linear"),
        beta_start=fields.number("beta_start", 1e-4, below=1),
        beta_end=fields.number("beta_end", 0.02, below=1),
        train_steps=fields.integer("num_train_timesteps", 1000),
        prediction=PREDICTIONS[fields.choice("prediction_type", PREDICTIONS, "epsilon")],
        spacing=fields.choice("timestep_spacing", SPACINGS, None),
        offset=fields.integer("steps_offset", 1, least=0) if ours else 1,
        final_alpha_one=fields.flag(
            "set_alpha_to_one", fields.values.get("_class_name") == "DDIMScheduler"
        ),
        zero_terminal_snr=fields.flag("rescale_betas_zero_snr", False),
    )


def write_config(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What `read_config` reads, and diffusers and transformers too: {file: its JSON}.

    Raises:
        ValueError: the pad token is none that a file can name.
    """
    text, unet, vae = config.text_encoder, config.unet, config.autoencoder
    schedule = config.schedule
    if text.pad_token not in PAD_TOKENS.values():
        raise ValueError(
            f"pad_token {text.pad_token} cannot be saved; {sorted(PAD_TOKENS.values())} can."
        )
    pad_token = _key(PAD_TOKENS, text.pad_token)
    return {
        "model_index.json": {
            "_class_name": INPAINT if unet.inpaints else PIPELINES[0],
            "_diffusers_version": "0.35.0",  # its inpainting pipeline opens none without
            OURS: {"name": config.name, "guidance": config.guidance},
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "text_encoder/config.json": {
            **SUPPORTED["text_encoder"],
            "architectures": ["CLIPTextModel"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_act": text.activation,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "max_position_embeddings": text.max_length,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "pad_token_id": text.pad_token,
            "projection_dim": text.width,
            "vocab_size": text.vocab_size,
        },
        "tokenizer/tokenizer_config.json": {
            "model_max_length": text.max_length,
            "pad_token": pad_token,
            "tokenizer_class": "CLIPTokenizer",
        },
        "tokenizer/special_tokens_map.json": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": pad_token,
            "unk_token": "<|endoftext|>",
        },
        "unet/config.json": {
            **SUPPORTED["unet"],
            "attention_head_dim": list(unet.heads),
            "block_out_channels": list(unet.widths),
            "cross_attention_dim": unet.context_width,
            "down_block_types": [DOWN[attend] for attend in unet.attention],
            "in_channels": unet.in_channels,
            "layers_per_block": unet.resnets,
            "norm_num_groups": unet.groups,
            "out_channels": unet.out_channels,
            "sample_size": config.image_size // vae.factor,
            "up_block_types": [UP[attend] for attend in reversed(unet.attention)],
            "use_linear_projection": unet.linear_projection,
        },
        "vae/config.json": {
            **SUPPORTED["vae"],
            "block_out_channels": list(vae.widths),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "latent_channels": vae.latent_channels,
            "layers_per_block": vae.resnets,
            "norm_num_groups": vae.groups,
            "sample_size": config.image_size,
            "scaling_factor": vae.scale,
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
        },
        "scheduler/scheduler_config.json": {
            **SUPPORTED["scheduler"],
            "_class_name": "DDIMScheduler",
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.betas,
            "beta_start": schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": schedule.train_steps,
            "prediction_type": _key(PREDICTIONS, schedule.prediction),
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "set_alpha_to_one": schedule.final_alpha_one,
            "steps_offset": schedule.offset,
            **({"timestep_spacing": schedule.spacing} if schedule.spacing else {}),
        },
    }


def _key(known: dict[str, Any], value: Any) -> str:
    return next(key for key, known_value in known.items() if known_value == value)
