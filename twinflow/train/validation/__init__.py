"""Held-out loss and sample images."""
