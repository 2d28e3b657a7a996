"""A running training: the hook, and all that a change of structure means to mmengine."""
