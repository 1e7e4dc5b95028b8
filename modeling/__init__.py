"""How graft computes: what the wings share, and a folder for each wing."""
