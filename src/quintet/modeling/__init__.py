"""Models as modules with a config, their outputs, and the way to and from checkpoints."""
