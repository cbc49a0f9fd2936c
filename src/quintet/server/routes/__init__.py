"""One file of routes for each part of the protocols."""
