"""What one command does, a stage at a time: each is called as in the key `stages`."""
