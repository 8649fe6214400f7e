"""Files: written whole, opened only when regular, read without running code in them. Every package may import it."""
