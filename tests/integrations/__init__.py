"""Whole trainings in each trainer, against the same training by hand."""
