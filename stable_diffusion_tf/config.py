"""What a model is made of, as data: frozen dataclasses and the published presets.

Variants of Stable Diffusion are values of these classes, not subclasses of the models.
"""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP text transformer (Radford et al. 2021, arXiv:2103.00020). Defaults: ViT-L/14, SD 1.x."""

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    pad_token: int = 49407  # SD 2.x pads with 0


@dataclass(frozen=True)
class UNetConfig:
    """Cross-attention UNet of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

    One entry of `widths`, `attention` and `heads` per level, finest level first. The middle
    block has the last level's width and heads and always attends.
    """

    in_channels: int = 4  # 9 for inpainting: latents, mask, masked image's latents
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    resnets: int = 2  # per level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # the number of heads, not their width
    context_width: int = 768
    linear_projection: bool = False  # proj_in/proj_out: dense (SD 2.x) or 1x1 convolution
    groups: int = 32

    @property
    def inpaints(self) -> bool:
        """Whether it sees a mask and the masked picture's latents beside its own."""
        return self.in_channels != self.out_channels


@dataclass(frozen=True)
class AutoencoderConfig:
    """KL-regularised autoencoder of latent diffusion (arXiv:2112.10752, section 3.1)."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2  # per level in the encoder; one more in the decoder
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # latents the UNet sees = scale * posterior's mean

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule and what the network predicts (DDPM, arXiv:2006.11239)."""

    betas: Literal["linear", "scaled_linear"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    prediction: Literal["epsilon", "v"] = "epsilon"
    spacing: Literal["leading", "trailing", "linspace"] | None = None  # None: the sampler's own
    offset: int = 1  # added to "leading" timesteps
    final_alpha_one: bool = False  # after the last step: alpha 1, or that of timestep 0
    zero_terminal_snr: bool = False  # rescale betas so that the last alpha is 0 (arXiv:2305.08891)


@dataclass(frozen=True)
class ModelConfig:
    """A whole Stable Diffusion model: its four networks, its schedule and its own defaults."""

    name: str = "stable-diffusion-v1"
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512  # pixels a side, when the caller names none
    guidance: float = 7.5  # unconditional_guidance_scale, when the caller names none

    def nameless(self) -> str:
        """All of it but the name, as text: equal for models that are made and used alike."""
        return repr(replace(self, name=""))


SD_1 = ModelConfig()

SD_1_INPAINT = replace(SD_1, name="stable-diffusion-v1-inpainting", unet=UNetConfig(in_channels=9))

SD_2_BASE = ModelConfig(
    name="stable-diffusion-v2-base",
    text_encoder=TextEncoderConfig(
        width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu", pad_token=0
    ),
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
)

SD_2 = replace(
    SD_2_BASE,
    name="stable-diffusion-v2",
    schedule=ScheduleConfig(prediction="v"),
    image_size=768,
)
