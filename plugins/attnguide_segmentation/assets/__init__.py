"""Files that ship with the library."""
