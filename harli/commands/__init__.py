"""The commands of ``harli``; what is slow to import is imported inside them."""
