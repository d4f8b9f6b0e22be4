"""Batched, KV-cached generation of text and speech, its samplers, prompts and file outputs."""
