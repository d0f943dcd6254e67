"""Measurements of the project against peers and floors."""
