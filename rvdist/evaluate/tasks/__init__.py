"""What is asked: the catalogue of tasks, their files and edits, and definitions that lm-eval lacks."""
