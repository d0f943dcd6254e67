"""The HTTP service: speech in, text out."""
