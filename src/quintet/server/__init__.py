"""An HTTP server over a serving engine: OpenAI's and Anthropic's protocols."""
