"""The student of a run, its teacher, optimizer, memory and parallel wrappers."""
