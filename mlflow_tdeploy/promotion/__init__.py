"""Promotion: the registry says which version should serve, and the servers are made to agree."""
