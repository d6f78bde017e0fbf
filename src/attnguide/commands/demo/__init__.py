"""`attnguide demo`."""
