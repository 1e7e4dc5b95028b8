"""The one exception for a user's mistake in a configuration or in what it points at."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A mistake of the user's, told in one line; scripts print it and leave with exit code 2."""
