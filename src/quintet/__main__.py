"""`python -m quintet` is `quintet`."""

from quintet.cli.main import main

main()
