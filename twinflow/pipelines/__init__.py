"""Few-step weights in stock diffusers pipelines."""
