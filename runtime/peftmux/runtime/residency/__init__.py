"""Which adapters the server knows, in which revision, and who uses them."""
