#!/usr/bin/env bash
# Trains the colour model on the emoji that ship with the package: autoencoder, text tower, denoiser.
# Each run resumes where it stopped, so the same command goes on after an interruption. Arguments go to the last run.
set -euo pipefail
cd "$(dirname "$0")/.."

finished() { test -s "runs/emoji/$1/metrics.json"; }
finished autoencoder || accelerate launch -q training/train_autoencoder.py --config training/configs/networks/emoji_autoencoder.yaml
finished clip || accelerate launch -q training/train_clip.py --config training/configs/networks/emoji_clip.yaml
accelerate launch -q training/train_t2i.py --config training/configs/emoji_64_128.yaml "$@"
