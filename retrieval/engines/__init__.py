"""Where vectors can be kept and searched, each behind one protocol; a server's client is imported when it is named."""
