"""The modules that models are made of: they take scalars and tensors, never a config."""
