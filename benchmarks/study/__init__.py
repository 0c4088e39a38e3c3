"""The parts of ``run_study.py``, one idea a file.

settings: what decides how one run ends, and its id. grid: from a study's file to its runs.
rows: the CSV, and who may train which run. runs: one run. workers: all of them, in one process or
several. labels, table, frontier, plot: what is made of the rows. command: the command line.
"""
