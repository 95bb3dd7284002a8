"""Jobs of GRAM: stage 1, stage 2, the discriminative baseline and evaluation."""
