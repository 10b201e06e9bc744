"""Text to the token ids that CLIP's text encoders read."""

from stable_diffusion_tf.tokenizer.bpe import Tokenizer as Tokenizer
from stable_diffusion_tf.tokenizer.prompts import Chunk as Chunk
from stable_diffusion_tf.tokenizer.prompts import chunks as chunks
from stable_diffusion_tf.tokenizer.prompts import emphasised as emphasised
from stable_diffusion_tf.tokenizer.prompts import filled_up as filled_up
