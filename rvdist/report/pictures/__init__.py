"""Pictures, all in one style. They compute nothing."""
