"""Graphs: tokens are nodes, and messages run along the edges that attention makes."""
