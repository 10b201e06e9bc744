"""A source -> filled models. Total: every variable filled, every tensor used or ignored by name."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import keras
from keras.src.backend.common import global_state

from stable_diffusion_tf.checkpoints.catalog import Source, open_checkpoint
from stable_diffusion_tf.checkpoints.fit import Match
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.compile import from_numpy
from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet

NOTED = "uninitialized_variables"  # Keras's own name for them
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
    source: Source, parts: Iterable[str], dtype: str | None = None
) -> dict[str, keras.Model]:
    """Build some networks; then fill them, once all the tensors are known to fit.

    What fails leaves nothing behind, in memory or in Keras.

    Args:
        source: as of `open_checkpoint`.
        parts: of "text_encoder", "unet", "encoder" and "decoder".
        dtype: Keras dtype policy of the networks, such as "float32", "float16" or
            "mixed_bfloat16"; None is Keras's global one. Weights are converted to its variables'.

    Raises:
        FileNotFoundError, CheckpointError: as of `open_checkpoint`; or tensors are missing, left
            over or of the wrong shape, all listed before any is read; or one is not finite.
    """
    checkpoint = open_checkpoint(source)
    with _without_values():
        models = {part: build_part(checkpoint.config, part, dtype) for part in parts}
    matches: list[Match] = []
    problems: list[str] = []
    for part, model in models.items():
        try:
            matches += checkpoint.match(part, model.weights)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    _fill(matches)
    return models


@contextmanager
def _without_values() -> Iterator[None]:
    """Variables made in it have no values and take no memory, until each is given its own.

    Random values that are then replaced would cost as much time as reading, and more memory. Keras
    notes the variables, to make their values at the end of whatever scope comes next; not ours.
    """
    noted = list(global_state.get_global_attribute(NOTED, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(NOTED, noted)


def _fill(matches: Sequence[Match]) -> None:
    """Gives the variables their values: two at a time, for most of it is waiting for memory."""

    def fill(match: Match) -> None:
        match.variable._initializer = partial(_first_value, match)
        match.variable._deferred_initialize()

    pool = ThreadPoolExecutor(2)
    try:
        for _ in pool.map(fill, matches):
            pass
    finally:  # after an error, what is not begun is not
        pool.shutdown(cancel_futures=True)


def _first_value(match: Match, shape, dtype):
    """A Keras initializer that reads a variable's tensor."""
    return from_numpy(match.read())


def load(source: Source, dtype: str | None = None) -> Models:
    """Build and fill all four networks. Arguments and errors as of `load_parts`."""
    checkpoint = open_checkpoint(source)
    return Models(checkpoint.config, **load_parts(checkpoint, MODELS, dtype))
