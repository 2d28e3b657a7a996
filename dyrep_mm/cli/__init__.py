"""The commands that come with the package; ``tools/`` has them under the names of OpenMMLab."""
