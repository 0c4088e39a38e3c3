"""What the paper computes, in plain torch; ``reference`` is the paper itself."""
