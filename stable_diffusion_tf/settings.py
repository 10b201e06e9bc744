"""How a picture was made, as text in its PNG: for people, for other programs, and to repeat it.

Settings have one name everywhere: that of `generate`'s or `from_pretrained`'s parameter, which the
command line's options bear too.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

KEYWORD = "stable_diffusion_tf"  # of the exact text; that for other programs is `parameters`
FACTS = "facts"  # beside the settings: what was so when it was drawn
SHOWN = 10  # hexadecimal digits of a hash, as elsewhere


def png_text(
    settings: Mapping[str, Any], facts: Mapping[str, Any], sampler: str = ""
) -> dict[str, str]:
    """How a picture was made -> PNG text by keyword.

    Args:
        settings: all that it takes to draw it again, by parameter: "prompt" and "seed", the rest of
            `generate`'s, and the model's "weights", "vae", "prediction", "dtype", "jit_compile",
            "engine" and "size", as "WIDTHxHEIGHT". Values are text, numbers, booleans or None.
        facts: what shows whether it still can be: "version", "model", "unet_sha256" and the like of
            the other networks that it took, …
        sampler: what A1111's web UI calls it; without, it has no such, and ours is told.

    Returns:
        `stable_diffusion_tf`, all of it exactly, as JSON; and `parameters` in the form of A1111's
        web UI, which most programs read.
    """
    return {
        "parameters": _a1111_text(settings, facts, sampler),
        KEYWORD: json.dumps({**settings, FACTS: dict(facts)}, ensure_ascii=False),
    }


def read_settings(text: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """PNG text by keyword -> settings and facts, as `png_text` was given them.

    What the settings are is for the caller to check, as it would those of any stranger.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    if KEYWORD not in text:
        raise ValueError("it does not say how to draw it: it was not made by `sdtf generate`")
    try:
        settings = json.loads(text[KEYWORD], parse_constant=_no_number)
        facts = settings.pop(FACTS)
        simple = all(isinstance(v, str | int | float | None) for v in settings.values())
        if not (simple and isinstance(facts, dict)):
            raise TypeError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError("the text that says how to draw it is damaged") from None
    return settings, facts


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _a1111_text(settings: Mapping[str, Any], facts: Mapping[str, Any], sampler: str) -> str:
    """The prompts, then "Steps: 25, Sampler: DDIM, …", as A1111's `create_infotext` writes it.

    What it does not know has names of our own, and is there when it is not as usual.
    """
    drawn_over = settings["input_image"] is not None
    guided = settings["unconditional_guidance_scale"] > 1
    fields = {
        "Steps": settings["num_steps"],
        "Sampler": sampler or settings["sampler"],
        # Without it, A1111 takes the one that it thinks best for the sampler.
        "Schedule type": "Karras" if settings["schedule"] == "karras" else "Uniform",
        "CFG scale": settings["unconditional_guidance_scale"],
        "Seed": settings["seed"],
        "Size": settings["size"],
        "Model hash": facts["unet_sha256"][:SHOWN],
        "Model": facts["model"],
        "VAE hash": settings["vae"] and facts["decoder_sha256"][:SHOWN],
        "VAE": settings["vae"] and PurePath(settings["vae"]).name,
        "Denoising strength": settings["input_image_strength"] if drawn_over else None,
        "Image": settings["input_image"] and PurePath(settings["input_image"]).name,
        "Mask": settings["input_mask"] and PurePath(settings["input_mask"]).name,
        "Mask feather": settings["mask_feather"] or None,
        "Clip skip": settings["clip_skip"] if settings["clip_skip"] > 1 else None,
        "Feature reuse": settings["reuse"] if settings["reuse"] > 1 else None,
        "RNG": "CPU" if settings["rng"] == "torch" else None,  # A1111's name of that generator
        "Emphasis": None if settings["emphasis"] else "None",
        "Eta DDIM": settings["eta"] or None,
        "CFG rescale": settings["guidance_rescale"] or None,
        "Precision": settings["dtype"],
        "Engine": settings["engine"],
        # Not a bare number, which A1111 would take for the version of its own whose ways to follow.
        "Version": f"stable-diffusion-tf {facts['version']}",
    }
    lines = [settings["prompt"]]
    if settings["negative_prompt"] and guided:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    said = (f"{label}: {_quoted(value)}" for label, value in fields.items() if value is not None)
    return "\n".join([*lines, ", ".join(said)])


def _quoted(value: Any) -> str:
    """A value as A1111 writes it: one with a comma, a colon or a line break is quoted as JSON."""
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if {",", ":", "\n"} & set(text) else text
