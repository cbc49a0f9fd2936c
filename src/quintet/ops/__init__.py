"""Pure functions of tensors, one idea a file; axis letters are those of docs/notation.md."""
