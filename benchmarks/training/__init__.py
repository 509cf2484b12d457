"""What training from a cache costs, beside what a user would do instead: see ``__main__``."""
