"""A source -> filled models. Total: every variable filled, every tensor used or ignored by name."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import keras
from keras import ops

from stable_diffusion_tf.checkpoints.catalog import Source, open_checkpoint
from stable_diffusion_tf.checkpoints.fit import Checkpoint, Match
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet

MODELS = {
    "text_encoder": lambda config, dtype: TextEncoder(config.text_encoder, dtype=dtype),
    "unet": lambda config, dtype: UNet(config.unet, dtype=dtype),
    "encoder": lambda config, dtype: Encoder(config.autoencoder, dtype=dtype),
    "decoder": lambda config, dtype: Decoder(config.autoencoder, dtype=dtype),
}


@dataclass(frozen=True)
class Models:
    """The four networks and their config."""

    config: ModelConfig
    text_encoder: keras.Model
    unet: keras.Model
    encoder: keras.Model
    decoder: keras.Model


def build_part(config: ModelConfig, part: str, dtype: str | None = None) -> keras.Model:
    """One network of `config` with random weights; `part` is a key of `MODELS`."""
    return MODELS[part](config, dtype)


def load_parts(
    source: Source | Checkpoint, parts: Iterable[str], dtype: str | None = None
) -> dict[str, keras.Model]:
    """Build some networks; then fill them, once all the tensors are known to fit.

    Args:
        source: as of `open_checkpoint`, or what it gave.
        parts: of "text_encoder", "unet", "encoder" and "decoder".
        dtype: Keras dtype policy of the networks, such as "float32", "float16" or
            "mixed_bfloat16"; None is Keras's global one. Weights are converted to its variables'.

    Raises:
        FileNotFoundError, CheckpointError: as of `open_checkpoint`; or tensors are missing, left
            over or of the wrong shape, all listed before any is read; or one is not finite.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Source) else source
    found: dict[int, Match] = {}  # by variable
    problems: list[str] = []
    with keras.StatelessScope():  # which makes the variables' first values at its end
        models = {part: build_part(checkpoint.config, part, dtype) for part in parts}
        for variable in (v for model in models.values() for v in model.weights):
            variable._initializer = partial(_first_value, found, problems, id(variable))
        for part, model in models.items():
            try:
                found |= {id(m.variable): m for m in checkpoint.match(part, model.weights)}
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return models


def _first_value(found: dict[int, Match], problems: list[str], variable: int, shape, dtype):
    """A Keras initializer that reads a variable's tensor, or gives zeros where there are problems.

    Random values that are then replaced would cost as much time as reading, and more memory. What
    is wrong is added to `problems`: raised here, it would leave Keras in the middle of its work.
    """
    if variable in found and not problems:
        try:
            return ops.transpose(found[variable].read(), found[variable].axes)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return ops.zeros(shape, dtype)


def load(source: Source, dtype: str | None = None) -> Models:
    """Build and fill all four networks. Arguments and errors as of `load_parts`."""
    checkpoint = open_checkpoint(source)
    return Models(checkpoint.config, **load_parts(checkpoint, MODELS, dtype))
