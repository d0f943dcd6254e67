"""What the speech LLM is, how it is trained and how it is judged."""
