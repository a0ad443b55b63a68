"""Several recipes on one document, side by side."""
