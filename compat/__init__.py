"""The owner's documents' own names, thin over graft's."""
