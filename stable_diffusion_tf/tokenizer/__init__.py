"""Text to the token ids that CLIP's text encoders read."""

from stable_diffusion_tf.tokenizer.bpe import Tokenizer as Tokenizer
