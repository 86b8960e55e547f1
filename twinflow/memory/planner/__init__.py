"""What a training step will need, predicted without a GPU and without weights."""
