"""How a server bears load; any that speaks OpenAI's protocol, as its clients do. No torch."""
