"""The parts of ``train_classifier.py``, one idea a file.

options: what the user asked for. data, batches, models: what is trained.
costs: how many steps each method gets, in FLOPs. training, clock, checkpoint: one run.
benchmark: all runs. store: what stands in the output folder. results, table, plot: what comes out.
"""
