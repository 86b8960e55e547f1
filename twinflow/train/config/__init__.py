"""Settings of a run: options, presets, config files."""
