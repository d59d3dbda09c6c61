"""How fast training is, and what its step is made of."""
