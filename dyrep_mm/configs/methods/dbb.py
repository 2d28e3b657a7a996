"""``_base_/methods/dbb.py`` in Python style."""

globals().update(__import__('dyrep_mm.configs').configs.load_config('_base_/methods/dbb.py'))
