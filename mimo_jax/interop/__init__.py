"""The published checkpoints: safetensors files, the map of names, and models in memory."""
