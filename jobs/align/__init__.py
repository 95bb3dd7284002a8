"""Using a reward: best-of-n, sampling, policy optimisation."""
