"""Stable Diffusion as Keras 3 models."""
