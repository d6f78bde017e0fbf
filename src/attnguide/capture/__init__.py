"""Internal: what happens to a model while it runs; hooks, recordings, and the state that is restored."""
