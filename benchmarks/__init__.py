"""Figures of the project against its peers, measured where they are run: ``make bench``."""
