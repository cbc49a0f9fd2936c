"""Whole numbers that options take: what is counted here fits 32 bits."""

import click

MOST = 2**31 - 1
COUNT, COUNT_OR_NONE = click.IntRange(1, MOST), click.IntRange(0, MOST)
THREADS = click.IntRange(1, 4096)
