"""Text to the token ids that CLIP's text encoders read."""

from stable_diffusion_tf.tokenizer.bpe import Tokenizer as Tokenizer
from stable_diffusion_tf.tokenizer.bpe import vocabulary_files as vocabulary_files
