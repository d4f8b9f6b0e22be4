"""Pre-training of audio language models in JAX: audio tokenizer, patch codec, LLM, data, generation, evaluation."""

__version__ = "0.1.0"
