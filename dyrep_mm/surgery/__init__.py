"""What is done to a model: changes that need torch alone and decide nothing."""
