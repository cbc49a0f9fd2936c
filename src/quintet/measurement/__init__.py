"""Measures a model's speed, and the limits of the machine."""
