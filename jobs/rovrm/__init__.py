"""The jobs of RoVRM: one phase of training, the chain of phases, evaluation."""
