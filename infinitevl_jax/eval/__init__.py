"""Measuring what a model can do, against what can be had without looking."""
