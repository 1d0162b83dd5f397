"""One HTML page that needs nothing else: what was found, and samples."""
