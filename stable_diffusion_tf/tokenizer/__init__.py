"""Text to the token ids that CLIP's text encoders read."""

from .bpe import Tokenizer as Tokenizer
