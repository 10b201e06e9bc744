"""Training of the autoencoder and of latent diffusion over it, on TensorFlow and on JAX."""
