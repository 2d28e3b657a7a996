_base_ = ['./plainvgg-b3_8xb32-200e_in1k.py', '../_base_/methods/dyrep.py']

# The last epoch that may grow, of 200: from the authors' files.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), end=100))
