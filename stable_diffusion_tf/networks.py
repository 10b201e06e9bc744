"""A model's four networks as functions of arrays: loaded, and compiled, when first used."""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.diffusion.denoiser import denoiser
from stable_diffusion_tf.diffusion.reuse import reusing
from stable_diffusion_tf.diffusion.schedule import Step
from stable_diffusion_tf.images import signed_to_unit, unit_to_signed, unit_to_uint8
from stable_diffusion_tf.preview import linear_decoder
from stable_diffusion_tf.tiling import tiled

TILE = 128  # latents a side, which a common GPU has room for: attention's logits take 1 GB


class _once:
    """A property made of a part, at first use, by one thread while the others wait for it.

    All that was made of a network goes once it has other variables, as with LoRA: what was compiled
    before would go on without them.
    """

    def __init__(self, part: str):
        self.part = part

    def __call__(self, make: Callable) -> "_once":
        self.make = make
        return self

    def __get__(self, networks: Any, owner: type | None = None) -> Any:
        if networks is None:
            return self
        with networks._building:
            variables = networks[self.part].variables
            of, made = networks._made.get(self.part, (None, {}))
            if of is None or [*map(id, of)] != [*map(id, variables)]:
                made = {}
                networks._made[self.part] = variables, made
            if self.make not in made:
                made[self.make] = self.make(networks)
            return made[self.make]


class Networks:
    """The text encoder, the UNet, and the autoencoder's encoder and decoder.

    They are indexed by part, as `checkpoints.load.MODELS` names them. The arrays they give
    have been found finite: FloatingPointError, if a network overflowed; what a `denoiser` computes,
    once it is taken by `latents`. Threads may share them.

    Attributes:
        tile: pixels a side, at most, that the autoencoder sees at once; may be set.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[Sequence[str]], dict[str, keras.Model]],
        compile: Callable[..., Callable],
    ):
        """Loads nothing yet.

        Args:
            config: theirs.
            load: `load(parts)` -> {part: network}.
            compile: `compile(function, variables)`, as of `compile.compiler`.
        """
        self.tile = TILE * config.autoencoder.factor
        self._config = config
        self._load = load
        self._compile = compile
        self._building = threading.RLock()
        self._loaded: dict[str, keras.Model] = {}
        self._made: dict[str, tuple[Sequence[Any], dict[Callable, Any]]] = {}

    def need(self, *parts: str) -> dict[str, keras.Model]:
        """Returns networks by part.

        Those not loaded yet are loaded together, so that one error names all that does not fit.
        """
        with self._building:
            if absent := [part for part in parts if part not in self._loaded]:
                self._loaded |= self._load(absent)
        return {part: self._loaded[part] for part in parts}

    def __getitem__(self, part: str) -> keras.Model:
        return self.need(part)[part]

    def read(self, ids: Sequence[int], clip_skip: int) -> np.ndarray:
        """A chunk's token ids (77,) -> the text encoder's states (77, width)."""
        with self._building:
            reader = self._reader(clip_skip)
        states = _alone(reader, np.array(ids, np.int32))
        return _finite("encoding the text", states, self["text_encoder"])

    def encode(self, pictures: Iterable[np.ndarray], noise: np.ndarray | None = None) -> np.ndarray:
        """Pictures (H, W, 3) in [0, 1] -> scaled latents (B, h, w, 4).

        They are the posterior's mean, or its samples by unit normal `noise`.
        """
        signed = map(unit_to_signed, pictures)
        moments = self._tiled(self._encoder, signed, reads=self._config.autoencoder.factor)
        latents, log_variance = np.split(_finite("encoding", moments, self["encoder"]), 2, -1)
        if noise is not None:
            latents = latents + np.exp(np.clip(log_variance, -30, 20) / 2) * noise
        return latents * np.float32(self._config.autoencoder.scale)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents (B, h, w, 4) -> pictures (B, H, W, 3) in [0, 1]."""
        pictures = self._tiled(self._decoder, latents, gives=self._config.autoencoder.factor)
        return signed_to_unit(_finite("decoding", pictures, self["decoder"]))

    def latents(self, x: Any, stage: str = "denoising") -> np.ndarray:
        """A sampler's tensor of latents as an array."""
        return _finite(stage, ops.convert_to_numpy(x), self["unet"])

    def preview(self, x0: Any) -> np.ndarray:
        """Latents being denoised -> small pictures, uint8 (B, h, w, 3)."""
        return unit_to_uint8(self._linear_decoder(self.latents(x0)))

    def denoiser(
        self,
        context: np.ndarray,
        negative_context: np.ndarray | None,
        guidance: float | None,
        rescale: float | None,
        channels: tuple[np.ndarray, ...] = (),
        reuse: int = 1,
    ) -> Callable:
        """Returns `denoise(x, step) -> x0`, for one run of a sampler.

        Args:
            context: the text encoder's states (B, 77 n, width).
            negative_context: the same, of what to be drawn away from; None: no guidance.
            guidance, rescale: see `diffusion.guidance.guided`.
            channels: what the UNet sees beside the latents, each (B, h, w, …).
            reuse: at every how many calls the whole UNet runs, see `diffusion.reuse`.
        """
        network = self._denoise
        if reuse > 1:
            network = reusing(self._denoise_keeping, self._denoise_reusing, reuse)
        # As tensors, so that no number is compiled in.
        given = tree.map_structure(
            _tensor,
            (context, negative_context, guidance, rescale, channels),
            none_is_leaf=False,
        )
        return lambda x, step: network(x, Step(*map(_tensor, step)), *given)

    @_once("unet")
    def _denoise(self) -> Callable:
        return self._denoiser(self["unet"])

    @_once("unet")
    def _denoise_keeping(self) -> Callable:
        return self._denoiser(self["unet"].keeping())

    @_once("unet")
    def _denoise_reusing(self) -> Callable:
        return self._denoiser(self["unet"].reusing())

    def _denoiser(self, unet: keras.Model) -> Callable:
        """`denoise(x, step, …, *deep)` -> x0; of a network that keeps deep features, those too."""
        prediction = self._config.schedule.prediction

        def denoise(x, step, context, negative_context, guidance, rescale, channels, *deep):
            kept = []

            def network(latents, timesteps, context):
                latents = ops.concatenate([latents, *channels], -1)
                output, *kept[:] = tree.flatten(unet([latents, timesteps, context, *deep]))
                return output

            x0 = denoiser(network, prediction, context, negative_context, guidance, rescale)(
                x, step
            )
            # In float32, exactly: engines pass no bfloat16 on.
            return (x0, *(ops.cast(x, "float32") for x in kept)) if kept else x0

        return self._compile(denoise, unet.variables)

    @_once("text_encoder")
    def _reader(self) -> Callable:
        """`_reader(clip_skip)`: the text encoder, each compiled once."""
        return cache(lambda clip_skip: self._compiled(self["text_encoder"].skipping(clip_skip)))

    @_once("encoder")
    def _encoder(self) -> Callable:
        return self._compiled(self["encoder"])

    @_once("decoder")
    def _decoder(self) -> Callable:
        return self._compiled(self["decoder"])

    @_once("decoder")
    def _linear_decoder(self) -> Callable:
        autoencoder = self._config.autoencoder
        return linear_decoder(self.decode, autoencoder.latent_channels, autoencoder.factor)

    def _compiled(self, model: keras.Model) -> Callable:
        def call(inputs):
            return ops.cast(model(inputs), "float32")

        return self._compile(call, model.variables)

    def _tiled(self, function: Callable, inputs: Iterable[np.ndarray], **cell: int) -> np.ndarray:
        """A batch through the encoder or the decoder: one by one, and large ones in tiles."""
        side = self.tile // self._config.autoencoder.factor
        return np.stack([tiled(partial(_alone, function), one, side, **cell) for one in inputs])


def _alone(function: Callable, one: np.ndarray) -> np.ndarray:
    """One of a batch through a function of batches: it is compiled once, for a batch of one."""
    return ops.convert_to_numpy(function(one[None]))[0]


def _finite(stage: str, values: np.ndarray, network: keras.Model) -> np.ndarray:
    """Passes on what a network computed, if it is finite."""
    if np.isfinite(values).all():
        return values
    dtype = network.outputs[0].dtype
    remedy = (
        "use dtype='bfloat16' or 'float32'"
        if dtype == "float16"
        else "lower the guidance scale, or take another checkpoint"
    )
    raise FloatingPointError(f"{stage}: the network overflowed in {dtype}; {remedy}")


def _tensor(value: Any) -> Any:
    return ops.convert_to_tensor(value, "float32")
