"""Models of torch that round as int8 does while they compute, so that ranges are found and weights trained under it."""
