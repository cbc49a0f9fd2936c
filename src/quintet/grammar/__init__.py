"""What may be written next: JSON by a schema, expressions, calls of tools."""
