"""What is done to captures and caches, and what is lost by it: see ``__main__``."""
