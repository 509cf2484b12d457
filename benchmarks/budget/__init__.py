"""What the same hours give with a teacher's cache, with the teacher in memory, and with neither: see ``__main__``."""
