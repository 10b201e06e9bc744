"""Text and pictures in, pictures out: tokenizer, networks, schedule and sampler put together."""

import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import keras
import numpy as np
from tqdm import tqdm

from stable_diffusion_tf import arguments, tasks
from stable_diffusion_tf.checkpoints.catalog import STABLE_DIFFUSION, Source, open_checkpoint
from stable_diffusion_tf.checkpoints.load import MODELS, Models, build_part, load_parts
from stable_diffusion_tf.checkpoints.save import check_target, save
from stable_diffusion_tf.compile import (
    compiler,
    memory_errors,
    runs_ahead,
    uses_onednn,
    when_compiling,
)
from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.diffusion.schedule import Step, start_scale, steps
from stable_diffusion_tf.images import (
    ImageSource,
    load_image,
    load_mask,
    unit_to_uint8,
)
from stable_diffusion_tf.networks import Networks
from stable_diffusion_tf.preview import Preview
from stable_diffusion_tf.samplers import Noise, get_sampler, picture_seeds
from stable_diffusion_tf.tiling import SMALLEST
from stable_diffusion_tf.tokenizer import Chunk, Tokenizer, chunks, emphasised, filled_up

DTYPES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
OUTPUTS = ("image", "float", "latents")

Condition = list[Chunk | np.ndarray]  # of a picture: chunks of text, or their states (77, width)

log = logging.getLogger(__name__)


class StableDiffusion:
    """A text-to-image latent diffusion model (Rombach et al. 2022, arXiv:2112.10752).

        sd = StableDiffusion.from_pretrained("emoji")
        images = sd.generate("a red apple, noto style", batch_size=4, seed=7)

    The networks are Keras models, built and filled when first used: `text_encoder`,
    `diffusion_model` (the UNet), `image_encoder` and `image_decoder`. The UNet sees a whole batch
    at once; the others run an image or a text at a time, so that they are compiled once and take
    no more memory for many; and what is larger than `tile`, in parts of that size.

    Threads may share one: it builds everything once, and pictures are the same as without them. Its
    sizes are those of all: where threads draw others, give each a pipeline, `from_models`.

    Attributes:
        config: the `ModelConfig`.
        img_height, img_width: size of the pictures that `generate` makes, in pixels.
        tokenizer: `encode(text)` gives ids without start, end and padding.
    """

    def __init__(
        self,
        img_height: int = 512,
        img_width: int = 512,
        max_text_len: int = 77,
        jit_compile: bool = False,
        download_weights: bool = True,
    ):
        """Makes Stable Diffusion 1.4, with the earlier Keras port's parameters and its weights.

        The weights are fetched from a hub, once: those of each network when it is first used. Their
        dtype policy is Keras's global one at this moment; `from_pretrained` takes one of its own.

        Args:
            img_height, img_width: multiples of 8.
            max_text_len: 77, the only length that the published text encoder has.
            jit_compile: compile through XLA: slower to start, then faster.
            download_weights: the published weights; False: random ones.

        Raises:
            TypeError, ValueError: a size is no multiple of 8, or `max_text_len` is not 77; or the
                Keras backend is not supported.
        """
        if isinstance(img_height, str | os.PathLike):
            raise TypeError(
                f"img_height must be a whole number of pixels, not {img_height!r}; a model is "
                f"opened by StableDiffusion.from_pretrained({img_height!r})"
            )
        checkpoint = open_checkpoint(STABLE_DIFFUSION)  # which needs no file yet
        positions = checkpoint.config.text_encoder.max_length
        if max_text_len != positions:
            raise ValueError(
                f"max_text_len must be {positions}, not {max_text_len!r}: the text encoder has "
                "that many positions"
            )
        policy = keras.config.dtype_policy()
        load = partial(load_parts, checkpoint, dtype=policy)
        if not download_weights:
            load = partial(_random, checkpoint.config, dtype=policy)
        _warn_of_dtype(policy.name)
        self._setup(checkpoint.config, load, img_height, img_width, jit_compile)

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        img_height: int | None = None,
        img_width: int | None = None,
        dtype: str = "float32",
        jit_compile: bool = False,
        engine: str | None = None,
        config: ModelConfig | None = None,
        prediction: Literal["epsilon", "v"] | None = None,
        vae: str | os.PathLike | None = None,
        ema: bool = False,
        variant: str | None = None,
    ) -> "StableDiffusion":
        """Opens a model: its files are checked now, its weights are read at first use.

        Weights on a hub are fetched at first use too, part by part.

        Args:
            source: a preset, such as "emoji"; a folder in the diffusers layout or with Keras's h5
                files; a single CompVis or Stability file, `.safetensors` or `.ckpt`; files by
                network, {"unet": path, …}; a repository on a hub in the diffusers layout,
                "owner/name"; or a file in one, "owner/name/path".
            img_height, img_width: multiples of the autoencoder's factor (8 for Stable Diffusion);
                None: the model's own.
            dtype: of the networks: "float32", "float16", "bfloat16", "mixed_float16" or
                "mixed_bfloat16". The noise levels are stepped through in float32 whatever it is.
            jit_compile: compile through XLA: slower to start, then faster.
            engine: what runs the networks: None, the Keras backend; "openvino": OpenVINO on the
                CPU, in bfloat16 where `dtype` has that, else in float32; for each shape that is
                drawn it compiles and keeps a copy of the weights. Needs
                `pip install openvino`.
            config: of files whose tensors' sizes are not those of a published model.
            prediction: what the UNet predicts, where its files do not say or are wrong.
            vae: another autoencoder: a file, or a folder with one.
            ema: take the UNet's moving average where a single file has both.
            variant: such as "fp16": which weights of a diffusers folder or repository to take.

        Raises:
            FileNotFoundError, CheckpointError, DownloadError: as of
                `checkpoints.catalog.open_checkpoint`; tensors that do not fit are found when the
                network they belong to is first used.
            TypeError, ValueError: a size does not fit the model; `dtype`, `prediction` or `engine`
                is unknown; `config`, `ema` or `variant` is for what has no such thing; or the Keras
                backend, or the engine on it, is not supported.
            ImportError: the engine is not installed.
        """
        arguments.check_choice("dtype", dtype, DTYPES)
        checkpoint = open_checkpoint(
            source, config=config, prediction=prediction, vae=vae, ema=ema, variant=variant
        )
        _warn_of_dtype(dtype, engine)
        sd = cls.__new__(cls)
        sd._setup(
            checkpoint.config,
            lambda parts: load_parts(checkpoint, parts, dtype),
            img_height,
            img_width,
            jit_compile,
            engine,
        )
        return sd

    @classmethod
    def from_models(
        cls,
        models: Models,
        *,
        img_height: int | None = None,
        img_width: int | None = None,
        jit_compile: bool = False,
        engine: str | None = None,
    ) -> "StableDiffusion":
        """Draws with networks that are in memory, such as those in training; they are not copied.

        An engine draws with the values that their weights had when it first drew in that shape, and
        previews are of the decoder as it was at the first.

        Args:
            models: the four networks and their config.
            img_height, img_width, jit_compile, engine: as of `from_pretrained`.

        Raises:
            TypeError, ValueError, ImportError: as of `from_pretrained`.
        """
        if not isinstance(models, Models):
            raise TypeError(
                f"models must be the networks and their config, a Models, not {models!r}; a name "
                "or a path is opened by StableDiffusion.from_pretrained"
            )
        sd = cls.__new__(cls)
        sd._setup(
            models.config,
            lambda parts: {part: getattr(models, part) for part in parts},
            img_height,
            img_width,
            jit_compile,
            engine,
        )
        return sd

    def _setup(
        self,
        config: ModelConfig,
        load: Callable[[Sequence[str]], dict[str, keras.Model]],
        img_height: int | None,
        img_width: int | None,
        jit_compile: bool,
        engine: str | None = None,
    ) -> None:
        # First of all: what cannot be had must not be found after the weights are read.
        compile = compiler(engine, jit_compile)
        img_height = config.image_size if img_height is None else img_height
        img_width = config.image_size if img_width is None else img_width
        self.config = config
        self.img_height, self.img_width = img_height, img_width
        self._size()
        self.tokenizer = Tokenizer()
        self._networks = Networks(config, load, compile)
        self._of_this_thread = threading.local()

    def _size(self) -> tuple[int, int]:
        """The pictures' height and width, checked: they are attributes, which may have been set."""
        height, width = self.img_height, self.img_width
        for name, size in (("img_height", height), ("img_width", width)):
            arguments.check_size(name, size, self.config.autoencoder.factor)
        arguments.check_pixels(1, height, width)
        return int(height), int(width)

    def _warn_of_size(self, height: int, width: int) -> None:
        learnt = self.config.image_size
        if not 1 / 4 < height * width / learnt**2 < 4:
            log.warning(
                "%s has learnt to draw at %dx%d; at %dx%d, pictures may make no sense",
                *(self.config.name, learnt, learnt, width, height),
            )

    def save_pretrained(self, target: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Writes the model, whole or not at all, for `from_pretrained`, diffusers and others.

        Args:
            target: a new folder, which gets the diffusers layout, with config and tokenizer; or, if
                its name ends in .safetensors, a new file, which gets that of CompVis's checkpoints.
            dtype: of the stored weights: "float32", "float16" or "bfloat16".

        Raises:
            FileExistsError: there is something at `target`.
            ValueError: unknown dtype, or kind of file; a single file of a model whose config is no
                published one; or a weight is not finite in the dtype.
            FileNotFoundError, CheckpointError, DownloadError: networks that were not used yet
                cannot be loaded.
        """
        check_target(target, dtype, self.config)
        save(Models(self.config, **self._networks.need(*MODELS)), target, dtype)

    @property
    def text_encoder(self) -> keras.Model:
        """token_ids (B, 77) int -> (B, 77, width)."""
        return self._networks["text_encoder"]

    @property
    def diffusion_model(self) -> keras.Model:
        """[latents (B, h, w, 4), timesteps (B,), context (n B, 77, width)] -> (n B, h, w, 4)."""
        return self._networks["unet"]

    @property
    def image_encoder(self) -> keras.Model:
        """images (B, H, W, 3) in [-1, 1] -> (B, h, w, 8): mean and log-variance, unscaled."""
        return self._networks["encoder"]

    @property
    def image_decoder(self) -> keras.Model:
        """scaled latents (B, h, w, 4) -> images (B, H, W, 3) in [-1, 1]."""
        return self._networks["decoder"]

    @property
    def last_seed(self) -> int | None:
        """The first picture's in this thread's last `generate`, given or drawn; None before it."""
        return getattr(self._of_this_thread, "last_seed", None)

    @property
    def tile(self) -> int:
        """Pixels a side, at most, that the autoencoder sees at once; 1024 for Stable Diffusion.

        May be set. Larger pictures are encoded and decoded in overlapping tiles of that size, which
        are blended: the memory is that of one tile. But the autoencoder's norms and attention look
        at all they see, so tiles differ a little from the whole; small ones (of 16 latents a side,
        say) so much that one may see where they meet.

        Raises:
            TypeError, ValueError: it is set to what is no multiple of the autoencoder's factor, or
                less than 8 times that (64 for Stable Diffusion).
        """
        return self._networks.tile

    @tile.setter
    def tile(self, pixels: int) -> None:
        factor = self.config.autoencoder.factor
        arguments.check_size("tile", pixels, factor, SMALLEST * factor)
        self._networks.tile = int(pixels)

    def generate(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_steps: int = 25,
        unconditional_guidance_scale: float | None = None,
        temperature: float = 1,
        seed: int | Sequence[int] | None = None,
        input_image: Any = None,
        input_mask: Any = None,
        input_image_strength: float = 0.5,
        *,
        sampler: str = "ddim",
        schedule: Literal["karras"] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        context: Any = None,
        negative_context: Any = None,
        clip_skip: int = 1,
        reuse: int = 1,
        emphasis: bool = True,
        rng: Literal["numpy", "torch"] = "numpy",
        diffusion_noise: Any = None,
        sample_posterior: bool = False,
        mask_feather: float = 0.0,
        output: Literal["image", "float", "latents"] = "image",
        progress: bool = True,
        callback: Callable[[int, int, Preview], Any] | None = None,
    ) -> np.ndarray:
        """Draws pictures: of one prompt `batch_size` times, or one of each prompt of a list.

        With `input_image`, it draws over that (image-to-image: SDEdit, Meng et al. 2022,
        arXiv:2108.01073); with `input_mask` too, only where the mask is white (inpainting).

        Image i uses the seed `seed + i` and is the same picture alone or in any batch of prompts
        with as many chunks. All arguments are checked before any work.

        Args:
            prompt: what to draw, with emphasis as in (red:1.3), see `tokenizer.prompts`; or a list
                of n; None only with `context`. Over 75 tokens are read in chunks of 75; prompts and
                negative prompts of fewer are filled up with empty ones, and that is logged.
            negative_prompt: what to be drawn away from, one or a list as long as the batch; without
                guidance it has no part.
            batch_size: number of pictures of one prompt; 1 or n with a list of n.
            num_steps: how many steps the sampler takes, exactly: 1 to 499 with "leading" spacing,
                1 to 999 or 1000 with the others, 1 to 50 with "lcm".
            unconditional_guidance_scale: how strongly the prompt counts (Ho and Salimans 2022,
                arXiv:2207.12598); 1 or less: no guidance, half the work. None: the model's own.
            temperature: scales the noise that a stochastic sampler adds.
            seed: from 0 to 2**64 - 1, or a list, one a picture; None or -1: one is drawn, logged
                and kept in `last_seed`.
            input_image: what to draw over: what `images.load_image` takes, or several, as a list
                or an array (n, H, W, C), one a picture. Stretched to the model's size, not cropped.
            input_mask: where: white, 0.5 and over, is repainted, black kept; one or several,
                likewise. Outside it, pictures are `input_image` exactly. Each latent goes by the
                first pixel of its square (8x8 for Stable Diffusion), and one at least is repainted.
            input_image_strength: over 0, up to 1: how far the input is left behind. The last
                `max(1, int(num_steps * input_image_strength))` steps run, from the input noised to
                the first of them; at 1, inpainting starts from noise alone.
            sampler: a name in `stable_diffusion_tf.samplers.SAMPLERS`.
            schedule: "karras": the noise levels of Karras et al. (2022, arXiv:2206.00364, equation
                5), for samplers that take them; None: the sampler's own.
            eta: 0 (deterministic) to 1 (ancestral), for "ddim".
            guidance_rescale: 0 to 1, against the over-exposure of strong guidance (Lin et al. 2023,
                arXiv:2305.08891, section 3.4).
            context: instead of a prompt, the text encoder's states: (77, width), or (n, 77, width),
                or those of several chunks.
            negative_context: the same instead of a negative prompt.
            clip_skip: 1, the text encoder as it is; 2, without its last layer; and so on.
            reuse: n: the whole UNet runs at the first of every n calls, and between them only its
                shallow rest, on the deep features of that call (DeepCache: Ma et al. 2023,
                arXiv:2312.00858): faster, and the pictures differ. A step is a call; to "heun",
                two. 1: all calls are whole.
            emphasis: whether brackets and BREAK in prompts have a meaning, or all is text.
            rng: whose random numbers the seed stands for: "numpy", or "torch", with which it is the
                seed of a `torch.Generator` on the CPU, one a picture.
            diffusion_noise: unit normal start noise (B, h, w, 4), instead of the seed's. With
                `input_image` it is the noise put on that.
            sample_posterior: encode `input_image` by a sample of the autoencoder's posterior, drawn
                from the seed, instead of its mean.
            mask_feather: width, in pixels, over which the repainted part fades in, inwards from the
                mask's edge; 0: a sharp seam. A mask narrower than twice that hardly shows; one that
                would not show at all is refused.
            output: "image": uint8 (B, H, W, 3); "float": the same in [0, 1] float32; "latents":
                scaled float32 (B, h, w, 4).
            progress: show a progress bar.
            callback: `callback(step, total, preview)`, called after each step, 1 to `total`. The
                preview is uint8 (B, h, w, 3), a pixel a latent: what the pictures look like so far,
                by a linear stand-in for the decoder, and only if it is looked at (see `Preview`).
                To cancel, raise an exception in it: `generate` ends there, with that exception. On
                JAX the next step has then begun.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
            FileNotFoundError: there is no such picture or model.
            CheckpointError: the model's files do not fit.
            DownloadError: weights cannot be fetched.
            FloatingPointError: a network overflowed, as some do in float16.
            MemoryError: there is not enough, with what would take less.
        """
        sample, levels, scale = self._sampling(sampler, eta, temperature, schedule, num_steps)
        guidance, rescale = arguments.guidance(
            unconditional_guidance_scale, guidance_rescale, self.config.guidance
        )
        strength = arguments.number(
            "input_image_strength", input_image_strength, "over 0, up to 1", lambda x: 0 < x <= 1
        )
        size = height, width = self._size()  # once: another thread may set another
        side = max(size)
        mask_feather = arguments.number(
            "mask_feather", mask_feather, f"from 0 to {side} pixels", lambda x: 0 <= x <= side
        )
        arguments.check_choice("output", output, OUTPUTS)
        arguments.check_clip_skip(clip_skip, self.config.text_encoder.layers)
        arguments.check_reuse(reuse)
        positive = self._conditions("prompt", prompt, "context", context, emphasis)
        images = arguments.sources("input_image", input_image)
        masks = arguments.sources("input_mask", input_mask)
        tasks.check(self.config, images, masks, sample_posterior, mask_feather)
        previewed, callback = callback is not None, arguments.function("callback", callback)
        count = arguments.picture_count(max(len(positive), len(images), len(masks)), batch_size)
        arguments.check_pixels(count, height, width)
        if negative_prompt is None and negative_context is None:
            negative_prompt = ""
        negative = self._conditions(
            "negative_prompt", negative_prompt, "negative_context", negative_context, emphasis
        )
        if guidance is None and (negative_context is not None or any(negative_prompt)):
            log.warning(
                "what not to draw has no effect without guidance: that takes a guidance scale of "
                "over 1"
            )
        arguments.check_counts(
            count,
            {
                "prompts or contexts": positive,
                "negative prompts or contexts": negative,
                "input images": images,
                "input masks": masks,
            },
        )
        autoencoder = self.config.autoencoder
        shape = *(side // autoencoder.factor for side in size), autoencoder.latent_channels
        eps = None
        if diffusion_noise is not None:
            eps = arguments.array("diffusion_noise", diffusion_noise, (count, *shape))
        seeds = picture_seeds(seed, count)
        noise = Noise(seeds, shape, rng)
        images = arguments.resized("input_image", images, load_image, *size)
        masks = arguments.resized("input_mask", masks, load_mask, *size)
        tasks.check_masks(masks, autoencoder.factor, mask_feather)
        conditions = positive * (count // len(positive))
        if guidance is not None:
            conditions += negative * (count // len(negative))
        conditions = filled_up(conditions, self._empty)
        if not images:
            self._warn_of_size(height, width)
        self._of_this_thread.last_seed = seeds[0]
        levels, first = tasks.begin(levels, scale, images, masks, strength)

        remedy = (
            f"too little memory for {count} of {width}x{height} at once; "
            "draw fewer, or smaller ones, or take a dtype of fewer bits"
        )
        shown = {"desc": "Loading the model", "unit": "step", "disable": not progress}
        with (
            memory_errors(remedy),
            tqdm(total=len(levels) - 1, **shown) as bar,
            when_compiling(lambda: bar.set_description(f"{bar.desc.partition(':')[0]}: compiling")),
        ):
            # All of them now: a damaged file must be found before the work.
            used = {
                "text_encoder": any(isinstance(part, Chunk) for one in conditions for part in one),
                "unet": True,
                "encoder": bool(images),
                "decoder": output != "latents" or previewed,
            }
            self._networks.need(*filter(used.get, used))
            bar.set_description("Encoding the text")
            states = self._states(conditions, clip_skip)
            if images:
                bar.set_description("Encoding the image")
            posteriors = map(noise.posterior, itertools.count())

            def encode(pictures):
                sampled = next(posteriors) if sample_posterior else None
                return self._networks.encode(pictures, sampled)

            def draw():
                return noise.start() if eps is None else eps

            task = tasks.prepare(
                self.config, sample, encode, images, masks, mask_feather, first, draw
            )
            negatives = None if guidance is None else states[count:]
            denoise = self._networks.denoiser(
                states[:count], negatives, guidance, rescale, task.channels, reuse
            )
            bar.set_description("Denoising")
            drawn = task.sample(denoise, task.start, levels, noise)
            if runs_ahead():  # each is looked at when the device has the next to do
                drawn = (now for now, _ in itertools.pairwise(itertools.chain(drawn, [None])))
            for step, (x, x0) in enumerate(drawn, 1):
                stage = f"denoising, step {step} of {bar.total}"
                latents = self._networks.latents(x, stage)
                bar.set_description("Denoising", refresh=False)
                bar.update()
                callback(step, bar.total, Preview(partial(self._networks.preview, x0)))
            if output == "latents":
                return latents
            bar.set_description("Decoding")
            pictures = task.finish(self._networks.decode(latents))
            bar.set_description("Drawn", refresh=False)
        return pictures if output == "float" else unit_to_uint8(pictures)

    def tokenize(
        self, prompts: str | Sequence[str], name: str = "prompts", *, emphasis: bool = True
    ) -> list[list[Chunk]]:
        """Returns what the text encoder reads of each prompt: chunks of 77 ids and their weights.

        Raises:
            TypeError, ValueError: there are none, or one is not text, or has a weight beyond 100.
                The message calls them `name`.
        """
        text = self.config.text_encoder
        return chunks(
            self.tokenizer,
            arguments.texts(name, prompts),
            text.max_length,
            text.pad_token,
            emphasis=emphasis,
            name=name,
        )

    def encode_text(
        self, prompts: str | Sequence[str], *, clip_skip: int = 1, emphasis: bool = True
    ) -> np.ndarray:
        """Returns the text encoder's states of prompts, (B, 77, width) float32.

        With n chunks in the longest prompt, it is (B, 77 n, width), as `context` may be.

        Args:
            prompts, clip_skip, emphasis: as of `generate`.

        Raises:
            TypeError, ValueError: as of `tokenize`, or `clip_skip` is out of range.
        """
        arguments.check_clip_skip(clip_skip, self.config.text_encoder.layers)
        conditions = filled_up(self.tokenize(prompts, emphasis=emphasis), self._empty)
        return self._states(conditions, clip_skip)

    def encode_image(
        self, images: ImageSource | Sequence[ImageSource], noise: Any = None
    ) -> np.ndarray:
        """Returns pictures' scaled latents, the posterior's mean or samples: (B, h, w, 4) float32.

        Args:
            images: (B, H, W, 3), uint8 or float in [0, 1]; or what `images.load_image` takes, one
                or a list. All of one size, whose sides are multiples of the autoencoder's factor.
            noise: unit normal (B, h, w, 4), to sample the posterior with; None: its mean.

        Raises:
            TypeError, ValueError, FileNotFoundError: they are not.
            FloatingPointError: the encoder overflowed, as some do in float16.
        """
        autoencoder = self.config.autoencoder
        pictures = arguments.same_size("images", images, autoencoder.factor)
        if noise is not None:
            count, height, width, _ = pictures.shape
            grid = height // autoencoder.factor, width // autoencoder.factor
            noise = arguments.array("noise", noise, (count, *grid, autoencoder.latent_channels))
        return self._networks.encode(pictures, noise)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Returns the pictures of scaled latents (B, h, w, 4): uint8 (B, H, W, 3).

        Raises:
            TypeError, ValueError: the latents are of another shape or not finite.
            FloatingPointError: the decoder overflowed, as some do in float16.
        """
        channels = self.config.autoencoder.latent_channels
        latents = arguments.array("latents", latents, ("B", "h", "w", channels))
        return unit_to_uint8(self._networks.decode(latents))

    def _sampling(
        self, sampler: str, eta: Any, temperature: Any, schedule: str | None, num_steps: int
    ) -> tuple[Callable, list[Step], float]:
        """Checks how to sample: the sampler, its noise levels, and the scale of noise alone."""
        method, config = get_sampler(sampler), self.config.schedule
        options = method.options(
            arguments.number("eta", eta),
            arguments.number("temperature", temperature),
            config.prediction,
        )
        grid = method.grid_on(schedule)
        levels = steps(config, num_steps, **grid)
        return partial(method.sample, **options), levels, start_scale(config, levels[0], **grid)

    def _conditions(
        self, prompt_name: str, prompt: Any, context_name: str, context: Any, emphasis: bool
    ) -> list[Condition]:
        """Checks what is to be drawn: prompts, or the states of some."""
        if (prompt is None) == (context is None):
            raise ValueError(f"give {prompt_name} or {context_name}, one of them and not both")
        if context is None:
            return self.tokenize(prompt, prompt_name, emphasis=emphasis)
        length, width = self.config.text_encoder.max_length, self.config.unet.context_width
        states = arguments.array(context_name, context, ("N", width), ("n", "N", width))
        if states.shape[-2] % length:
            raise ValueError(
                f"{context_name} must have the states of whole chunks, a multiple of {length} of "
                f"them, not {states.shape[-2]}"
            )
        return [list(one) for one in states.reshape(-1, states.shape[-2] // length, length, width)]

    @property
    def _empty(self) -> Chunk:
        ((chunk,),) = self.tokenize("")
        return chunk

    def _states(self, conditions: list[Condition], clip_skip: int) -> np.ndarray:
        """Conditions of n chunks each -> (B, 77 n, width)."""
        read = cache(partial(self._networks.read, clip_skip=clip_skip))

        def states(chunk):
            if isinstance(chunk, np.ndarray):
                return chunk
            return emphasised(read(chunk.ids), chunk.weights)

        return np.stack([np.concatenate([*map(states, condition)]) for condition in conditions])


def _warn_of_dtype(dtype: str, engine: str | None = None) -> None:
    if dtype in ("float16", "mixed_float16") and engine is None and uses_onednn():
        log.warning(
            "%s is for GPUs: on a processor, TensorFlow can take hundreds of times as long in it; "
            "take bfloat16 or float32, or set TF_ENABLE_ONEDNN_OPTS=0 before it starts",
            dtype,
        )


def _random(config: ModelConfig, parts: Sequence[str], dtype: str) -> dict[str, keras.Model]:
    return {part: build_part(config, part, dtype) for part in parts}
