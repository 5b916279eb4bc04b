"""The inputs of a denoiser besides the noisy latents: control record and text tokens; and their guidance."""
