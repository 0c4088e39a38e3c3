"""The parts of the command line: ``python -m ssprop_patch``, one command a file.

report, measure, schedule: the commands. models: from MODEL to a network. options: what several
commands take. output: tables, JSON, CSV, pictures. errors: what ends a command, in one line.
"""
