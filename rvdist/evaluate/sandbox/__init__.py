"""Where programs that a model wrote run: the caller, what runs inside, and the kernel's walls between them."""
