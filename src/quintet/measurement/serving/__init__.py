"""Load tests of servers that speak OpenAI's protocol, without torch."""
