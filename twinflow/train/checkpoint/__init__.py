"""Checkpoints, and the state that a run resumes from."""
