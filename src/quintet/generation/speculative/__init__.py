"""Speculative decoding: a draft of several tokens, checked by one forward."""
