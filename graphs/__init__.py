"""Graphs made from what is not yet a graph: plans of databases, texts."""
