"""A small language model and its tokenizer, to be trained from text where nothing can be downloaded."""
