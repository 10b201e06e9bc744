"""The forward process, as data, and what turns a network into a denoiser."""
