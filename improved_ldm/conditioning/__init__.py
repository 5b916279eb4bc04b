"""What a denoiser is told besides the noisy latents: control record, text tokens, guidance."""
