"""Forecasts of other methods, by the same accounting."""
