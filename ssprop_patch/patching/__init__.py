"""Which layers are converted, why, and doing it."""
