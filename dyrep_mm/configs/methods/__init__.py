"""The methods of ``configs/_base_/methods`` in Python style, each as the dict ``dyrep``."""
