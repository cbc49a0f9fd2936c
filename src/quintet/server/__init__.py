"""HTTP over a serving engine: the protocols of OpenAI and Anthropic; needs the extra `serve`."""
