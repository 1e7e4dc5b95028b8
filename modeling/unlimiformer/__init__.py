"""Memory (Unlimiformer): attention over an input of any length."""
