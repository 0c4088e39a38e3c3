"""The parts of the command line: ``python -m ssprop_patch``, one command a file.

report, measure, run, schedule, env: the commands. models: from MODEL to a network. script: running
a training script. options: what several commands take. times, output: tables, JSON, CSV, pictures.
errors: what ends a command, in one line.
"""
