"""Jobs of CTC-NAST: data preparation, training (also of the autoregressive sibling), translation, evaluation, distillation."""
