"""A model's report: one page that says what it is, what is known of its variants, and what they cost."""
