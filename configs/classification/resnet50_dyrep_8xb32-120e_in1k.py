_base_ = ['./resnet50_8xb32-120e_in1k.py', '../_base_/methods/dyrep.py']

# The last epoch that may grow, of 120: from the authors' files.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), end=100))
