"""Models: transformer blocks, audio tokenizer, patch codec and audio language model (flax Linen)."""
