"""Fixtures of pictures, models and plugins, and a way to call the command line."""

from tests.helpers.command_line import _elsewhere, call, faces, photos, plugins

__all__ = ["_elsewhere", "call", "faces", "photos", "plugins"]
