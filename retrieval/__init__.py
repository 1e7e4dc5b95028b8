"""What is stored and found: search usable without any model of ours."""
