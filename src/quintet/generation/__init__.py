"""Text generation: from logits to text."""
