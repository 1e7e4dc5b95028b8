"""From the raw texts of chunks to a graph of the things they name, and from there to weights between chunks."""
