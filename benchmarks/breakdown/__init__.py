"""Where the time of a training step goes: for where.py."""
