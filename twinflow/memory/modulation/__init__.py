"""Deferred modulation: layers whose weights need not stay on the GPU."""
