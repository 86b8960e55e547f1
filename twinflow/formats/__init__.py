"""Files on disk: the manifest of an export, its folder, ComfyUI's names, generation settings."""
