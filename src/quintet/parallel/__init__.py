"""One model on several processes: their parts, and their communication."""
