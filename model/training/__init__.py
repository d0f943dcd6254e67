"""Stages that make a speech LLM, and the one loop that trains them."""
