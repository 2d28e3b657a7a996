_base_ = ['./mobilenet-v1_8xb32-90e_in1k.py', '../_base_/methods/dyrep.py']

# The last epoch that may grow, of 90: from the authors' files.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), end=70))
