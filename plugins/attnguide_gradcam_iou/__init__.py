"""Grad-CAM-IoU with masks that a user paints."""
