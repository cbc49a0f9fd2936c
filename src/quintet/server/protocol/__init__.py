"""Request and answer bodies of each protocol."""
