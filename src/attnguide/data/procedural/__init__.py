"""Drawn faces with exact labels, masks and landmarks."""
