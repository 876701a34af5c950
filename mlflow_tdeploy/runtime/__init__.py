"""Open a variant on this host, and choose which."""
