"""Internal: the guide, its terms, the gradient check, and compiling."""
