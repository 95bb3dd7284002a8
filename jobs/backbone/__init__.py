"""Jobs that make a small language model, so that every method can be tried without downloads."""
