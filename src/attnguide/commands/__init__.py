"""Internal: the commands of `attnguide`; each is imported when it is called."""
