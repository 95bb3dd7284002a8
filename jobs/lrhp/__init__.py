"""Jobs of LRHP: training of the pair encoder, encoding, evaluation, margin prediction."""
