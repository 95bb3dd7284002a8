"""Jobs of LiSA: analysis, conversion, training and evaluation of models that share attention scores."""
