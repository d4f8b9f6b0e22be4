"""Text tokenizers: SentencePiece and Hugging Face `tokenizer.json` behind one interface."""
