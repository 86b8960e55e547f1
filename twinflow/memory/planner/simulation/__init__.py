"""One step of a model without weights, and the bytes and operations that it takes."""
