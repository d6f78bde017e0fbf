"""`attnguide explain`."""
