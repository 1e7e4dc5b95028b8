"""Query plans of DuckDB and PostgreSQL as graphs whose features mean the same on every database."""
