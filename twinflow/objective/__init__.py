"""The TwinFlow objective: from the random draws of a step to its loss."""
