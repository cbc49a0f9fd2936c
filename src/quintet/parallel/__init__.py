"""One model on several processes: who has which part, and what passes between them."""
