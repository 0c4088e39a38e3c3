"""What gpu.py does: are the kernels right, and what do they bring."""
