"""Command lines, thin over the library."""
