"""The four networks as Keras models, each a page read from top to bottom."""

from stable_diffusion_tf.models.autoencoder import Decoder, Encoder
from stable_diffusion_tf.models.text_encoder import TextEncoder
from stable_diffusion_tf.models.unet import UNet

__all__ = ["Decoder", "Encoder", "TextEncoder", "UNet"]
