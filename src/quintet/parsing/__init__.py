"""What a model wrote, told apart while it arrives: reasoning, content, calls of tools."""
