"""Data of training: images, videos, captions, caches of latents, and the stream of samples."""
