"""What is decided: scores and rules that need torch alone and change no model."""
