"""From a source to variants with evidence: export, fuse, quantize, verify."""
