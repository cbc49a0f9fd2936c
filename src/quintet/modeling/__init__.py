"""Models as modules with a config: forward, outputs, loading and saving."""
