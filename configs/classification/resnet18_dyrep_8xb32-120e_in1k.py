_base_ = ['./resnet18_8xb32-120e_in1k.py', '../_base_/methods/dyrep.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
