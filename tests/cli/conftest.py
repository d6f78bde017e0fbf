"""Pictures, models and a way to call the command line."""

from tests.helpers.command_line import _elsewhere, call, faces, photos

__all__ = ["_elsewhere", "call", "faces", "photos"]
