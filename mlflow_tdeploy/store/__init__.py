"""Bundle layout, hashes, safe paths, atomic writes, the content cache."""
