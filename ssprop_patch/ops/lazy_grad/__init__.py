"""Batch norm's and ReLU's gradients, formed for the kept channels only."""
