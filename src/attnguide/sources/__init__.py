"""Attribution sources: where the model looks."""
