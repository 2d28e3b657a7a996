_base_ = ['./mobilenet-v1_8xb32-90e_in1k.py', '../_base_/methods/dyrep.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
