"""The single file of github.com/CompVis/stable-diffusion and Stability-AI/stablediffusion.

model.diffusion_model.         the UNet; its moving average is `model_ema.`, without dots
first_stage_model.             the autoencoder; alone in a file of its own, without this prefix
cond_stage_model.transformer.  the text encoder of SD 1.x, by transformers' names
cond_stage_model.model.        that of SD 2.x, by OpenCLIP's names, with one layer more than is used
"""

import logging
import re
from collections.abc import Iterator

from stable_diffusion_tf.checkpoints.diffusers import AXES, SUFFIXES
from stable_diffusion_tf.checkpoints.diffusers import TABLES as DIFFUSERS
from stable_diffusion_tf.checkpoints.fit import Table
from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.config import ModelConfig

log = logging.getLogger(__name__)

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# The schedule, and what training kept.
BUFFERS = (
    r"^(betas|alphas_cumprod(_prev)?|lvlb_weights|logvar|scale_factor|global_step)$",
    r"^(sqrt_(recip(m1)?_)?(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod)$",
    r"^posterior_(variance|log_variance_clipped|mean_coef[12])$",
    r"^(model_ema|denoiser)\.(decay|num_updates|sigmas|log_sigmas)$",
)

OPEN_CLIP_NAMES = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)

RESNET = (
    (r"^([a-z_]+[\d.]+\.)norm1\.", r"\1in_layers.0."),
    (r"^([a-z_]+[\d.]+\.)conv1\.", r"\1in_layers.2."),
    (r"^([a-z_]+[\d.]+\.)time_emb_proj\.", r"\1emb_layers.1."),
    (r"^([a-z_]+[\d.]+\.)norm2\.", r"\1out_layers.0."),
    (r"^([a-z_]+[\d.]+\.)conv2\.", r"\1out_layers.3."),
    (r"^([a-z_]+[\d.]+\.)conv_shortcut\.", r"\1skip_connection."),
)

VAE_NAMES = (
    (r"\.down_blocks\.(\d)\.", r".down.\1."),
    (r"\.resnets\.(\d)\.", r".block.\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def tables(config: ModelConfig, file: TensorFile, ema: bool = False) -> dict[str, Table]:
    """A table for each network that a whole checkpoint holds.

    As published tools do, the UNet's own weights are taken where its moving average lies beside
    them; `ema`: the average. Where it is alone, it is taken without being asked for.

    Raises:
        CheckpointError: the average is asked for and not there.
    """
    held = {
        prefix: any(name.startswith(prefix) for name in file.names)
        for prefix in (UNET, EMA, VAE, CLIP, OPEN_CLIP)
    }
    found = {}
    if held[OPEN_CLIP]:
        found["text_encoder"] = open_clip_table(config)
    elif held[CLIP]:
        found["text_encoder"] = clip_table()
    if ema and not held[EMA]:
        raise CheckpointError(f"{file.path} has no moving average of the UNet; leave out `ema`.")
    if held[EMA]:
        ema = ema or not held[UNET]
        log.info("%s: the UNet's %s weights are taken", file.path, "EMA" if ema else "non-EMA")
    if held[UNET] or held[EMA]:
        found["unet"] = unet_table(config, ema)
    if held[VAE]:
        found |= vae_tables(config, VAE)
    return found


def clip_table() -> Table:
    inside = re.escape(CLIP)
    return Table(
        SUFFIXES,
        AXES,
        prefix=CLIP + DIFFUSERS["text_encoder"].prefix,
        aliases=((f"^{inside}(embeddings|encoder|final)", CLIP + r"text_model.\1"),),
        ignored=(
            *others("cond_stage_model."),
            rf"^{inside}(vision_model|visual_projection|text_projection)\.",
            r"\.position_ids$",
            r"^cond_stage_model\.(transformer\.)?(logit_scale|text_projection)",
        ),
    )


def open_clip_table(config: ModelConfig) -> Table:
    inside = re.escape(OPEN_CLIP)
    return Table(
        SUFFIXES,
        AXES,
        prefix=OPEN_CLIP,
        renames=OPEN_CLIP_NAMES,
        pieces=(r"\.q_proj/", r"\.k_proj/", r"\.v_proj/"),
        ignored=(
            *others("cond_stage_model."),
            rf"^{inside}transformer\.resblocks\.{config.text_encoder.layers}\.",
            rf"^{inside}(text_projection|logit_scale|attn_mask)$",
        ),
    )


def unet_table(config: ModelConfig, ema: bool) -> Table:
    renames = (*unet_blocks(config), *RESNET)
    if ema:
        return Table(
            SUFFIXES,
            AXES,
            prefix=EMA,
            renames=(*renames, (r"\.", "")),
            ignored=(*others("model_ema."), *BUFFERS),
        )
    return Table(SUFFIXES, AXES, prefix=UNET, renames=renames, ignored=others("model."))


def unet_blocks(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Which of the input, middle and output blocks, counted through all levels, a block of ours is.

    A level is `resnets` blocks and what changes the size; up, that is part of the last block.
    """
    yield r"^time_embedding\.linear_1\.", "time_embed.0."
    yield r"^time_embedding\.linear_2\.", "time_embed.2."
    yield r"^conv_in\.", "input_blocks.0.0."
    yield r"^conv_norm_out\.", "out.0."
    yield r"^conv_out\.", "out.2."
    yield r"^mid_block\.resnets\.0\.", "middle_block.0."
    yield r"^mid_block\.attentions\.0\.", "middle_block.1."
    yield r"^mid_block\.resnets\.1\.", "middle_block.2."
    count = config.unet.resnets + 1
    for level, attends in enumerate(reversed(config.unet.attention)):
        down, up = rf"^down_blocks\.{level}\.", rf"^up_blocks\.{level}\."
        for i in range(config.unet.resnets):
            block = f"input_blocks.{1 + count * level + i}"
            yield rf"{down}resnets\.{i}\.", f"{block}.0."
            yield rf"{down}attentions\.{i}\.", f"{block}.1."
        yield rf"{down}downsamplers\.0\.conv\.", f"input_blocks.{count * (level + 1)}.0.op."
        for i in range(count):
            block = f"output_blocks.{count * level + i}"
            yield rf"{up}resnets\.{i}\.", f"{block}.0."
            yield rf"{up}attentions\.{i}\.", f"{block}.1."
        yield rf"{up}upsamplers\.0\.", f"{block}.{1 + attends}."


def vae_tables(config: ModelConfig, prefix: str) -> dict[str, Table]:
    """The encoder's and the decoder's table; `prefix` is `first_stage_model.` or empty."""
    coarsest = len(config.autoencoder.widths) - 1
    levels = tuple((rf"\.up_blocks\.{i}\.", f".up.{coarsest - i}.") for i in range(coarsest + 1))
    inside = re.escape(prefix)
    other_half = {
        "encoder": rf"^{inside}(decoder|post_quant_conv)\.",
        "decoder": rf"^{inside}(encoder|quant_conv)\.",
    }
    elsewhere = others(prefix) if prefix else ("^model_ema\\.", *BUFFERS)
    return {
        part: Table(
            SUFFIXES,
            AXES,
            prefix=prefix,
            renames=(*levels, *VAE_NAMES),
            ignored=(*elsewhere, other, rf"^{inside}loss\."),
            pointwise=r"\.attn_1\.(q|k|v|proj_out)\.weight$",
        )
        for part, other in other_half.items()
    }


def others(prefix: str) -> tuple[str, ...]:
    """Patterns of all that a whole checkpoint holds but what begins with `prefix`."""
    prefixes = ("model.", "model_ema.", "first_stage_model.", "cond_stage_model.")
    return (*(f"^{re.escape(other)}" for other in prefixes if other != prefix), *BUFFERS)
