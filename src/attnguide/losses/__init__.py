"""Alignment losses: how far attribution and prior are apart."""
