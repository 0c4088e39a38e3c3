"""The parts of ``train_ddpm.py``, one idea a file.

settings: what decides how one run ends, and the command line. model: the U-Net and its noise.
training: one run's loop. measure, distance: what is measured of a trained model. runs: all
runs, each a row of the CSV. table: what is printed.
"""
