"""The parts of the pipeline: arguments, prompts, sizes and the denoising loop."""
