"""Sound: reading and writing files, spectral features, packing of clips."""
