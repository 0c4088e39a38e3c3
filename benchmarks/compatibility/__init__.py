"""Trainings by libraries that take long to install: a converted network against a masked one."""
