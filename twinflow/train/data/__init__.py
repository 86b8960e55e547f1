"""Images, captions, encodings and batches of a run."""
