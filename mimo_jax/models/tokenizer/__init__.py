"""Audio tokenizer: mel encoder, residual vector quantiser, decoder, vocoder, and the text decoder of A2T."""
