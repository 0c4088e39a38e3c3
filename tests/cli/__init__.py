"""``python -m ssprop_patch``: in this process, and as one of its own where that matters."""
