"""Target priors: where the model should look."""
