"""Internal: compares an optimized map with attributions that were not optimized, and swaps image regions."""
