"""Speculative decoding: drafts of several tokens, verified by one forward."""
