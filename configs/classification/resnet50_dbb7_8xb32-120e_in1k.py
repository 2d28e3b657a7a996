_base_ = ['./resnet50_8xb32-120e_in1k.py', '../_base_/methods/dbb7.py']

default_hooks = dict(dyrep=_base_.pop('dyrep'))
