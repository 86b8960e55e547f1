"""What a run records and prints."""
