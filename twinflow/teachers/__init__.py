"""Teachers: EMA, the student itself, frozen weights; and where their weights live."""
