"""A model of what a query costs: messages up its plan."""
